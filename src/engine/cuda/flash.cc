#include "engine/cuda/flash.h"

#include <ATen/ops/_flash_attention_backward.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cmath>

#include "base/check.h"

namespace uly::engine::cuda {
namespace {

// Tensors over one head span: tokens x heads x H.
struct Tensors {
  const AttentionArgs& a;
  const ops::HeadSpan& span;
  c10::Device device;

  at::Tensor of(const kernels::Matrix& m, int64_t first_head, int64_t heads) const {
    return at::from_blob(static_cast<std::byte*>(m.data) + first_head * a.heads.H * bytes_of(m.dtype), {m.rows, heads, a.heads.H}, {m.stride, a.heads.H, 1}, at::TensorOptions(at::kBFloat16).device(device));
  }
  // Heads that the kernels do not take, of a size that is no multiple of 8, with zeros behind.
  at::Tensor padded(const at::Tensor& t) const { return missing() == 0 ? t : at::constant_pad_nd(t, {0, missing()}); }
  at::Tensor cut(const at::Tensor& t) const { return t.narrow(2, 0, a.heads.H); }
  int64_t missing() const { return round_up(a.heads.H, 8) - a.heads.H; }
  double scale() const { return 1.0 / std::sqrt(static_cast<double>(a.heads.H)); }
  at::Tensor queries(const kernels::Matrix& m) const { return of(m, span.first_query, span.n()); }
  at::Tensor keys(const kernels::Matrix& m) const { return of(m, a.heads.n + span.first_kv, span.groups); }
  at::Tensor values(const kernels::Matrix& m) const { return of(m, a.heads.n + a.heads.k + span.first_kv, span.groups); }
  at::Tensor lse() const {
    return at::from_blob(static_cast<float*>(a.lse.data) + span.first_query * a.lse.rows, {span.n(), a.lse.rows}, at::TensorOptions(at::kFloat).device(device));
  }
};

template <typename F>
void for_spans(const AttentionArgs& a, const std::vector<int64_t>& starts, void* starts_on_device, kernels::Stream stream, int device, F&& f) {
  const c10::Device gpu(c10::kCUDA, static_cast<c10::DeviceIndex>(device));
  const c10::cuda::CUDAStreamGuard guard(c10::cuda::getStreamFromExternal(stream, static_cast<c10::DeviceIndex>(device)));
  const at::Tensor cumulative = at::from_blob(starts_on_device, {static_cast<int64_t>(starts.size())}, at::TensorOptions(at::kInt).device(gpu));
  int64_t longest = 0;
  for (size_t d = 0; d + 1 < starts.size(); ++d) longest = std::max(longest, starts[d + 1] - starts[d]);
  try {
    for (const ops::HeadSpan& span : ops::head_spans(a.heads, a.schedule.kv_heads_at_once)) f(Tensors{a, span, gpu}, cumulative, longest);
  } catch (const c10::OutOfMemoryError& e) {
    throw DeviceError(fmt::format("flash attention of {} tokens: {}", a.qkv.rows, e.what_without_backtrace()));
  } catch (const c10::AcceleratorError& e) {
    throw DeviceError(fmt::format("flash attention: {}", e.what_without_backtrace()));
  }
}

}  // namespace

void flash_forward(const AttentionArgs& a, const std::vector<int64_t>& starts, void* starts_on_device, kernels::Stream stream, int device) {
  for_spans(a, starts, starts_on_device, stream, device, [&](const Tensors& t, const at::Tensor& cumulative, int64_t longest) {
    const auto [o, lse, rng, unused, mask] = at::_flash_attention_forward(t.padded(t.queries(a.qkv)), t.padded(t.keys(a.qkv)), t.padded(t.values(a.qkv)), cumulative, cumulative, longest, longest, 0.0, /*is_causal=*/true, /*return_debug_mask=*/false, t.scale());
    t.queries(a.o).copy_(t.cut(o));
    t.lse().copy_(lse);
  });
}

void flash_backward(const AttentionArgs& a, const std::vector<int64_t>& starts, void* starts_on_device, kernels::Stream stream, int device) {
  for_spans(a, starts, starts_on_device, stream, device, [&](const Tensors& t, const at::Tensor& cumulative, int64_t longest) {
    const at::Tensor rng = at::empty({2}, at::TensorOptions(at::kUInt64).device(t.device)), unused = at::empty({}, at::TensorOptions(at::kUInt64).device(t.device));
    const auto [dq, dk, dv] = at::_flash_attention_backward(t.padded(t.queries(a.d_o)), t.padded(t.queries(a.qkv)), t.padded(t.keys(a.qkv)), t.padded(t.values(a.qkv)), t.padded(t.queries(a.o)), t.lse(), cumulative, cumulative, longest, longest, 0.0,
                                                                /*is_causal=*/true, rng, unused, t.scale());
    t.queries(a.dqkv).copy_(t.cut(dq));
    t.keys(a.dqkv).copy_(t.cut(dk));
    t.values(a.dqkv).copy_(t.cut(dv));
  });
}

}  // namespace uly::engine::cuda
