// Instructions that one kernel of kernels/*.cu carries out.
#include <ATen/Parallel.h>

#include "engine/cuda/cuda_engine.h"
#include "kernels/elementwise.h"
#include "kernels/embed.h"
#include "kernels/loss.h"
#include "kernels/norm.h"
#include "kernels/norm_rope.h"
#include "kernels/optimizer.h"
#include "kernels/rope.h"
#include "kernels/swiglu.h"

namespace uly::engine::cuda {

void CudaEngine::zero(ops::Buffer y) {
  const Range r = range(Work::kElementwise, "zero");
  kernels::zero(matrix(y), stream_);
}

void CudaEngine::copy(ops::Buffer y, ops::Buffer x) {
  const Range r = range(Work::kElementwise, "copy");
  kernels::copy({matrix(y), matrix(x)}, stream_);
}

void CudaEngine::add_bias(ops::Buffer y, ops::Buffer b) {
  const Range r = range(Work::kElementwise, "add_bias");
  kernels::add_bias({matrix(y), matrix(b)}, stream_);
}

void CudaEngine::bias_grad(ops::Buffer db, ops::Buffer dy) {
  const Range r = range(Work::kElementwise, "bias_grad");
  kernels::bias_grad({.db = matrix(db), .dy = matrix(dy), .scratch = scratch(kernels::column_sum_scratch_bytes(dy.rows, dy.columns))}, stream_);
}

void CudaEngine::rms_norm(ops::Buffer y, ops::Buffer rstd, ops::Buffer x, ops::Buffer w, double eps) {
  const Range r = range(Work::kElementwise, "rms_norm");
  kernels::rms_norm({.y = matrix(y), .rstd = matrix(rstd), .x = matrix(x), .w = matrix(w), .eps = eps}, stream_);
}

void CudaEngine::rms_norm_grad(ops::Buffer dx, ops::Buffer dw, ops::Buffer dy, ops::Buffer x, ops::Buffer rstd, ops::Buffer w) {
  const Range r = range(Work::kElementwise, "rms_norm_grad");
  kernels::rms_norm_grad({.dx = matrix(dx), .dw = matrix(dw), .dy = matrix(dy), .x = matrix(x), .rstd = matrix(rstd), .w = matrix(w), .scratch = scratch(kernels::column_sum_scratch_bytes(x.rows, x.columns))}, stream_);
}

void CudaEngine::norm_rope(ops::Buffer x, ops::Buffer raw, ops::Buffer rstd, ops::Buffer w, ops::Buffer table, double eps) {
  const Range r = range(Work::kElementwise, "norm_rope");
  kernels::norm_rope({.y = matrix(x), .raw = matrix(raw), .rstd = matrix(rstd), .x = matrix(x), .w = matrix(w), .table = matrix(table), .head_size = w.columns, .eps = eps}, stream_);
}

void CudaEngine::norm_rope_grad(ops::Buffer dx, ops::Buffer dw, ops::Buffer raw, ops::Buffer rstd, ops::Buffer w, ops::Buffer table) {
  const Range r = range(Work::kElementwise, "norm_rope_grad");
  const int64_t H = w.columns;
  kernels::norm_rope_grad({.dx = matrix(dx), .dw = matrix(dw), .x = matrix(raw), .rstd = matrix(rstd), .w = matrix(w), .table = matrix(table), .head_size = H, .scratch = scratch(kernels::column_sum_scratch_bytes(raw.rows * (raw.columns / H), H))},
                          stream_);
}

void CudaEngine::rope_table(ops::Buffer table) {
  const Range r = range(Work::kElementwise, "rope_table");
  kernels::rope_table({.table = matrix(table), .positions = matrix(input(ops::Input::kPositions_s)), .inv_freq = inverse_frequencies_, .scaling = batch().rope_factor}, stream_);
}

void CudaEngine::rope(ops::Buffer x, ops::Buffer table, int direction) {
  const Range r = range(Work::kElementwise, "rope");
  kernels::rope({matrix(x), matrix(table), direction}, stream_);
}

void CudaEngine::swiglu(ops::Buffer a, ops::Buffer gate_up) {
  const Range r = range(Work::kElementwise, "swiglu");
  kernels::swiglu({matrix(a), matrix(gate_up)}, stream_);
}

void CudaEngine::swiglu_grad(ops::Buffer gate_up, ops::Buffer a, ops::Buffer da) {
  const Range r = range(Work::kElementwise, "swiglu_grad");
  kernels::swiglu_grad({matrix(gate_up), matrix(a), matrix(da)}, stream_);
}

void CudaEngine::cross_entropy(ops::Buffer logits, ops::Buffer loss, ops::Buffer labels) {
  const Range r = range(Work::kElementwise, "cross_entropy");
  kernels::cross_entropy({.logits = matrix(logits), .loss = matrix(loss), .labels = matrix(labels), .scale = static_cast<float>(batch().scale)}, stream_);
}

void CudaEngine::sum_loss(ops::Buffer total, ops::Buffer loss) {
  const Range r = range(Work::kElementwise, "sum_loss");
  kernels::sum_loss({.total = static_cast<double*>(address(total)), .loss = matrix(loss), .scale = batch().scale}, stream_);
}

void CudaEngine::embed(ops::Buffer h, ops::Buffer table, ops::Buffer ids) {
  const Range r = range(Work::kElementwise, "embed");
  kernels::embed({matrix(h), matrix(table), matrix(ids)}, stream_);
}

void CudaEngine::embed_grad(ops::Buffer dtable, ops::Buffer dh, ops::Buffer ids) {
  const Range r = range(Work::kElementwise, "embed_grad");
  kernels::embed_grad({.dtable = matrix(dtable), .dh = matrix(dh), .ids = matrix(ids), .skip_id = batch().padding_token}, stream_);
}

void CudaEngine::pack_columns(ops::Buffer send, ops::Buffer x, const ops::ColumnBlocks& blocks) {
  const Range r = range(Work::kElementwise, "pack_columns");
  const auto ranges = packed_columns(blocks, x.rows);
  kernels::pack_columns({.x = matrix(x), .packed = address(send), .ranges = ranges.data(), .num_ranges = static_cast<int64_t>(ranges.size())}, stream_);
}

void CudaEngine::unpack_columns(ops::Buffer x, ops::Buffer received, const ops::ColumnBlocks& blocks) {
  const Range r = range(Work::kElementwise, "unpack_columns");
  const auto ranges = packed_columns(blocks, x.rows);
  kernels::unpack_columns({.x = matrix(x), .packed = address(received), .ranges = ranges.data(), .num_ranges = static_cast<int64_t>(ranges.size())}, stream_);
}

void CudaEngine::sum_pieces(ops::Buffer shard, ops::Buffer received, int64_t pieces) {
  const Range r = range(Work::kElementwise, "sum_pieces");
  kernels::sum_pieces({.shard = matrix(shard), .received = matrix(received), .pieces = pieces}, stream_);
}

void CudaEngine::squared_norm(ops::Buffer total, ops::Buffer x) {
  const Range r = range(Work::kOptimizer, "squared_norm");
  kernels::squared_norm({.total = static_cast<double*>(address(total)), .x = matrix(x), .scratch = scratch(kernels::kNormScratchBytes)}, stream_);
}

ops::Event CudaEngine::adamw(ops::Buffer weight, ops::Buffer master, ops::Buffer m, ops::Buffer v, ops::Buffer gradient, ops::Buffer norm, ops::Buffer loss, const ops::UpdateRange& range_of) {
  const kernels::AdamwArgs args = adamw_args(weight, master, m, v, gradient, norm, loss, range_of);
  if (m.tier == ops::Tier::kHost) {
    rethrow();
    if (!host_) host_.emplace(stream_);
    return pending({.tasks = &*host_, .number = host_->queue("adamw on the host", [args] { at::parallel_for(0, args.count, 32768, [&](int64_t begin, int64_t end) { kernels::cpu::adamw(args, begin, end); }); })});
  }
  const Range r = range(Work::kOptimizer, "adamw");
  kernels::adamw(args, stream_);
  return {};
}

}  // namespace uly::engine::cuda
