// The gradient's norm and AdamW on this rank's shards.
#include "kernels/optimizer.h"

#include <ATen/Parallel.h>

#include <array>

#include "engine/cpu/cpu_engine.h"

namespace uly::engine {

void CpuEngine::squared_norm(ops::Buffer total, ops::Buffer x) {
  std::array<double, kernels::kNormBlocks> scratch;
  const kernels::SquaredNormArgs args{.total = static_cast<double*>(address(total)), .x = matrix(x), .scratch = scratch.data()};
  at::parallel_for(0, kernels::kNormBlocks, 64, [&](int64_t begin, int64_t end) { kernels::cpu::squared_norm_blocks(args, begin, end); });
  kernels::cpu::squared_norm_total(args);
}

ops::Event CpuEngine::adamw(ops::Buffer weight, ops::Buffer master, ops::Buffer m, ops::Buffer v, ops::Buffer gradient, ops::Buffer norm, ops::Buffer loss, const ops::UpdateRange& range) {
  const kernels::AdamwArgs args = adamw_args(weight, master, m, v, gradient, norm, loss, range);
  const auto update = [args] { at::parallel_for(0, args.count, 32768, [&](int64_t begin, int64_t end) { kernels::cpu::adamw(args, begin, end); }); };
  if (m.tier == ops::Tier::kHost) return started_by(host_, Aside::kHostUpdate, update);
  update();
  return {};
}

}  // namespace uly::engine
