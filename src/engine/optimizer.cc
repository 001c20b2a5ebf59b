// The gradient's norm and AdamW on this rank's shards.
#include "kernels/optimizer.h"

#include <ATen/Parallel.h>

#include <array>

#include "engine/engine.h"

namespace uly::engine {

void Engine::squared_norm(ops::Buffer total, ops::Buffer x) {
  std::array<double, kernels::kNormBlocks> scratch;
  const kernels::SquaredNormArgs args{.total = static_cast<double*>(address(total)), .x = matrix(x), .scratch = scratch.data()};
  at::parallel_for(0, kernels::kNormBlocks, 64, [&](int64_t begin, int64_t end) { kernels::cpu::squared_norm_blocks(args, begin, end); });
  kernels::cpu::squared_norm_total(args);
}

void Engine::adamw(ops::Buffer weight, ops::Buffer master, ops::Buffer m, ops::Buffer v, ops::Buffer gradient, ops::Buffer total, const ops::UpdateRange& range) {
  const auto at = [&](const ops::Buffer& b) { return address(b.column_range(range.first, range.count)); };
  const kernels::AdamwArgs args{.weight = at(weight),
                                .weight_dtype = weight.dtype,
                                .master = static_cast<float*>(at(master)),
                                .m = static_cast<float*>(at(m)),
                                .v = static_cast<float*>(at(v)),
                                .gradient = static_cast<float*>(at(gradient)),
                                .count = range.count,
                                .squared_norm = static_cast<const double*>(address(total)),
                                .clip = update_.clip,
                                .learning_rate = update_.learning_rate,
                                .beta1 = update_.beta1,
                                .beta2 = update_.beta2,
                                .eps = update_.eps,
                                .weight_decay = range.decays ? update_.weight_decay : 0.0,
                                .step = update_.step};
  at::parallel_for(0, range.count, 32768, [&](int64_t begin, int64_t end) { kernels::cpu::adamw(args, begin, end); });
}

}  // namespace uly::engine
