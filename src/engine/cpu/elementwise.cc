// Instructions that kernels/cpu carries out, spread over threads. Results do not depend on how the ranges are cut.
#include <ATen/Parallel.h>

#include "engine/cpu/cpu_engine.h"
#include "kernels/elementwise.h"
#include "kernels/embed.h"
#include "kernels/loss.h"
#include "kernels/norm.h"
#include "kernels/norm_rope.h"
#include "kernels/rope.h"
#include "kernels/swiglu.h"

namespace uly::engine {
namespace {

namespace cpu = kernels::cpu;

constexpr int64_t kElementsAtOnce = 32768;  // per thread, at least

// Runs kernel(args, begin, end) over `count` items of `elements` each.
template <typename Args>
void over(int64_t count, int64_t elements_each, const Args& args, void (*kernel)(const Args&, int64_t, int64_t)) {
  at::parallel_for(0, count, std::max<int64_t>(1, kElementsAtOnce / std::max<int64_t>(1, elements_each)), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// Over columns, in ranges of at least 64.
template <typename Args>
void over_columns(int64_t columns, int64_t rows, const Args& args, void (*kernel)(const Args&, int64_t, int64_t)) {
  at::parallel_for(0, columns, std::max<int64_t>(64, kElementsAtOnce / std::max<int64_t>(1, rows)), [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace

void CpuEngine::zero(ops::Buffer y) { over(y.elements(), 1, matrix(y), &cpu::zero); }
void CpuEngine::copy(ops::Buffer y, ops::Buffer x) { over(y.elements(), 1, kernels::CopyArgs{matrix(y), matrix(x)}, &cpu::copy); }
void CpuEngine::add_bias(ops::Buffer y, ops::Buffer b) { over(y.rows, y.columns, kernels::AddBiasArgs{matrix(y), matrix(b)}, &cpu::add_bias); }
void CpuEngine::bias_grad(ops::Buffer db, ops::Buffer dy) { over_columns(dy.columns, dy.rows, kernels::BiasGradArgs{matrix(db), matrix(dy)}, &cpu::bias_grad); }

void CpuEngine::rms_norm(ops::Buffer y, ops::Buffer rstd, ops::Buffer x, ops::Buffer w, double eps) {
  over(x.rows, x.columns, kernels::RmsNormArgs{.y = matrix(y), .rstd = matrix(rstd), .x = matrix(x), .w = matrix(w), .eps = eps}, &cpu::rms_norm);
}

void CpuEngine::rms_norm_grad(ops::Buffer dx, ops::Buffer dw, ops::Buffer dy, ops::Buffer x, ops::Buffer rstd, ops::Buffer w) {
  const kernels::RmsNormGradArgs args{.dx = matrix(dx), .dw = matrix(dw), .dy = matrix(dy), .x = matrix(x), .rstd = matrix(rstd), .w = matrix(w)};
  over(x.rows, x.columns, args, &cpu::rms_norm_grad_dx);
  over_columns(x.columns, x.rows, args, &cpu::rms_norm_grad_dw);
}

void CpuEngine::norm_rope(ops::Buffer x, ops::Buffer raw, ops::Buffer rstd, ops::Buffer w, ops::Buffer table, double eps) {
  over(x.rows, x.columns, kernels::NormRopeArgs{.y = matrix(x), .raw = matrix(raw), .rstd = matrix(rstd), .x = matrix(x), .w = matrix(w), .table = matrix(table), .head_size = w.columns, .eps = eps}, &cpu::norm_rope);
}

void CpuEngine::norm_rope_grad(ops::Buffer dx, ops::Buffer dw, ops::Buffer raw, ops::Buffer rstd, ops::Buffer w, ops::Buffer table) {
  const kernels::NormRopeGradArgs args{.dx = matrix(dx), .dw = matrix(dw), .x = matrix(raw), .rstd = matrix(rstd), .w = matrix(w), .table = matrix(table), .head_size = w.columns};
  over_columns(w.columns, raw.rows * (raw.columns / w.columns), args, &cpu::norm_rope_grad_dw);  // before dx overwrites dy
  over(raw.rows, raw.columns, args, &cpu::norm_rope_grad_dx);
}

void CpuEngine::rope_table(ops::Buffer table) {
  over(table.rows, table.columns * 8,
       kernels::RopeTableArgs{.table = matrix(table), .positions = matrix(input(ops::Input::kPositions_s)), .inv_freq = batch().inverse_frequencies.data(), .scaling = batch().rope_factor}, &cpu::rope_table);
}

void CpuEngine::rope(ops::Buffer x, ops::Buffer table, int direction) { over(x.rows, x.columns, kernels::RopeArgs{matrix(x), matrix(table), direction}, &cpu::rope); }

void CpuEngine::swiglu(ops::Buffer a, ops::Buffer gate_up) { over(a.rows, a.columns * 4, kernels::SwigluArgs{matrix(a), matrix(gate_up)}, &cpu::swiglu); }

void CpuEngine::swiglu_grad(ops::Buffer gate_up, ops::Buffer a, ops::Buffer da) {
  over(da.rows, da.columns * 4, kernels::SwigluGradArgs{matrix(gate_up), matrix(a), matrix(da)}, &cpu::swiglu_grad);
}

void CpuEngine::cross_entropy(ops::Buffer logits, ops::Buffer loss, ops::Buffer labels) {
  over(logits.rows, logits.columns * 4, kernels::CrossEntropyArgs{.logits = matrix(logits), .loss = matrix(loss), .labels = matrix(labels), .scale = static_cast<float>(batch().scale)}, &cpu::cross_entropy);
}

void CpuEngine::sum_loss(ops::Buffer total, ops::Buffer loss) { cpu::sum_loss({.total = static_cast<double*>(address(total)), .loss = matrix(loss), .scale = batch().scale}); }

void CpuEngine::embed(ops::Buffer h, ops::Buffer table, ops::Buffer ids) { over(h.rows, h.columns, kernels::EmbedArgs{matrix(h), matrix(table), matrix(ids)}, &cpu::embed); }

void CpuEngine::embed_grad(ops::Buffer dtable, ops::Buffer dh, ops::Buffer ids) {
  // Transformers gives the padding token's row no gradient from here; the head's, where tied, stays.
  over_columns(dh.columns, dh.rows, kernels::EmbedGradArgs{.dtable = matrix(dtable), .dh = matrix(dh), .ids = matrix(ids), .skip_id = batch().padding_token}, &cpu::embed_grad);
}

}  // namespace uly::engine
