// Linear maps on the CPU: fp32 straight through BLAS into the given buffers; bf16 on fp32 copies of row tiles, with one
// rounding of the result. Of a rehearsal the first rows only.
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include "engine/cpu/cpu_engine.h"

namespace uly::engine {
namespace {

constexpr int64_t kRowsAtOnce = 2048;  // of bf16 operands that are copied to fp32

// Calls f(first, count) for tiles of rows.
template <typename F>
void for_row_tiles(int64_t rows, F&& f) {
  for (int64_t first = 0; first < rows; first += kRowsAtOnce) f(first, std::min(kRowsAtOnce, rows - first));
}

bool bf16(const at::Tensor& t) { return t.scalar_type() == at::kBFloat16; }
at::Tensor fp32(const at::Tensor& t) { return t.to(at::kFloat); }

}  // namespace

void CpuEngine::linear(ops::Buffer y_tO, ops::Buffer x_tI, ops::Buffer w_OI) {
  if (!cut(Map::kLinear, w_OI, {&x_tI}, &y_tO)) return;
  at::Tensor y = tensor(y_tO);
  const at::Tensor x = tensor(x_tI), w = tensor(w_OI);
  if (!bf16(x)) {
    at::mm_out(y, x, w.t());
    return;
  }
  const at::Tensor w32 = fp32(w);
  for_row_tiles(x.size(0), [&](int64_t first, int64_t n) { y.narrow(0, first, n).copy_(at::mm(fp32(x.narrow(0, first, n)), w32.t())); });
}

void CpuEngine::linear_add(ops::Buffer y_tO, ops::Buffer x_tI, ops::Buffer w_OI, ops::Buffer r_tO) {
  if (!cut(Map::kLinearAdd, w_OI, {&x_tI, &r_tO}, &y_tO)) return;
  at::Tensor y = tensor(y_tO);
  const at::Tensor x = tensor(x_tI), w = tensor(w_OI), r = tensor(r_tO);
  if (!bf16(x)) {
    at::addmm_out(y, r, x, w.t());
    return;
  }
  const at::Tensor w32 = fp32(w);
  for_row_tiles(x.size(0), [&](int64_t first, int64_t n) { y.narrow(0, first, n).copy_(at::addmm(fp32(r.narrow(0, first, n)), fp32(x.narrow(0, first, n)), w32.t())); });
}

void CpuEngine::linear_dx(ops::Buffer dx_tI, ops::Buffer dy_tO, ops::Buffer w_OI) {
  if (!cut(Map::kDx, w_OI, {&dy_tO}, &dx_tI)) return;
  at::Tensor dx = tensor(dx_tI);
  const at::Tensor dy = tensor(dy_tO), w = tensor(w_OI);
  if (!bf16(dy)) {
    at::mm_out(dx, dy, w);
    return;
  }
  const at::Tensor w32 = fp32(w);
  for_row_tiles(dy.size(0), [&](int64_t first, int64_t n) { dx.narrow(0, first, n).copy_(at::mm(fp32(dy.narrow(0, first, n)), w32)); });
}

void CpuEngine::linear_dw(ops::Buffer dw_OI, ops::Buffer dy_tO, ops::Buffer x_tI, bool add) {
  if (!cut(Map::kDw, dw_OI, {&dy_tO, &x_tI})) return;
  at::Tensor dw = tensor(dw_OI);
  const at::Tensor dy = tensor(dy_tO), x = tensor(x_tI);
  if (!bf16(dy)) {
    if (add) at::addmm_out(dw, dw, dy.t(), x);
    else at::mm_out(dw, dy.t(), x);
    return;
  }
  for_row_tiles(dy.size(0), [&](int64_t first, int64_t n) {
    const at::Tensor dy32 = fp32(dy.narrow(0, first, n)), x32 = fp32(x.narrow(0, first, n));
    if (add || first > 0) at::addmm_out(dw, dw, dy32.t(), x32);
    else at::mm_out(dw, dy32.t(), x32);
  });
}

}  // namespace uly::engine
