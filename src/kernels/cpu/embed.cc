#include "kernels/embed.h"

#include "kernels/access.h"
#include "kernels/cpu/clones.h"

namespace uly::kernels::cpu {

ULY_CLONES void embed(const EmbedArgs& a, int64_t begin, int64_t end) {
  for_float_types(a.h.dtype, a.table.dtype, "embed", [&](auto t, auto u) ULY_INLINE_LAMBDA {
    using T = decltype(t);
    using W = decltype(u);
    for (int64_t i = begin; i < end; ++i) {
      T* h = row_of<T>(a.h, i);
      const W* row = row_of<W>(a.table, *row_of<int64_t>(a.ids, i));
      ULY_LANES
      for (int64_t j = 0; j < a.h.columns; ++j) h[j] = from_float<T>(to_float(row[j]));
    }
  });
}

ULY_CLONES void embed_grad(const EmbedGradArgs& a, int64_t begin, int64_t end) {
  for_float_type(a.dh.dtype, "embed_grad", [&](auto t) ULY_INLINE_LAMBDA {
    using T = decltype(t);
    for (int64_t i = 0; i < a.dh.rows; ++i) {
      const int64_t id = *row_of<int64_t>(a.ids, i);
      if (id == a.skip_id) continue;
      float* sum = row_of<float>(a.dtable, id);
      const T* dh = row_of<T>(a.dh, i);
      ULY_LANES
      for (int64_t j = begin; j < end; ++j) sum[j] += to_float(dh[j]);
    }
  });
}

}  // namespace uly::kernels::cpu
