// Prints the rate of each CUDA kernel on bf16 activations of an 8B model, counting the bytes that it must move, beside the
// rate of a plain device copy.
//
//   g++ -std=c++20 -O2 -Isrc -I$CUDA/include bench/kernels_gpu.cc build/libuly_kernels.a ... $CUDA/lib/libcudart_static.a -ldl -lrt -lpthread
#include <cuda_runtime.h>

#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "kernels/elementwise.h"
#include "kernels/embed.h"
#include "kernels/exchange.h"
#include "kernels/loss.h"
#include "kernels/norm.h"
#include "kernels/optimizer.h"
#include "kernels/rope.h"
#include "kernels/swiglu.h"

namespace {

using namespace uly;
using namespace uly::kernels;

Matrix make(int64_t rows, int64_t columns, Dtype dtype) {
  Matrix m{.data = nullptr, .dtype = dtype, .rows = rows, .columns = columns, .stride = columns};
  const size_t bytes = static_cast<size_t>(rows * columns * (dtype == Dtype::kBf16 ? 2 : dtype == Dtype::kF32 ? 4 : 8));
  if (cudaMalloc(&m.data, bytes) != cudaSuccess) std::puts("out of device memory");
  cudaMemset(m.data, 0, bytes);
  return m;
}

void run(const char* name, double bytes, const std::function<void()>& f) {
  cudaEvent_t start, stop;
  cudaEventCreate(&start), cudaEventCreate(&stop);
  float best = 1e30f;
  for (int i = 0; i < 12; ++i) {
    float milliseconds = 0;
    cudaEventRecord(start), f(), cudaEventRecord(stop), cudaEventSynchronize(stop);
    cudaEventElapsedTime(&milliseconds, start, stop);
    if (i >= 2 && milliseconds < best) best = milliseconds;
  }
  std::printf("%-16s %7.0f GB/s %9.3f ms\n", name, bytes / static_cast<double>(best) / 1e6, static_cast<double>(best));
}

void run_activations() {
  const int64_t s = 65536, D = 4096, H = 128;
  const double matrix = static_cast<double>(s * D * 2);
  const Matrix x = make(s, D, Dtype::kBf16), y = make(s, D, Dtype::kBf16), z = make(s, D, Dtype::kBf16), wide = make(s, 2 * D, Dtype::kBf16),
               w = make(1, D, Dtype::kBf16);
  const Matrix dw = make(1, D, Dtype::kF32), rstd = make(s, 1, Dtype::kF32), head_rstd = make(s, D / H, Dtype::kF32), table = make(s, H, Dtype::kF32),
               ids = make(s, 1, Dtype::kI64);
  const Matrix near_ids = make(s, 1, Dtype::kI64);
  const Matrix dtable = make(128256, D, Dtype::kF32), wider = make(s, D, Dtype::kF32);
  std::vector<int64_t> host(static_cast<size_t>(s));
  for (size_t i = 0; i < host.size(); ++i) host[i] = static_cast<int64_t>(i * 7919 % 128256);
  cudaMemcpy(ids.data, host.data(), host.size() * 8, cudaMemcpyHostToDevice);
  for (int64_t& id : host) id %= s;
  cudaMemcpy(near_ids.data, host.data(), host.size() * 8, cudaMemcpyHostToDevice);
  void* scratch = make(1, 1 << 22, Dtype::kF32).data;
  run("copy", 2 * matrix, [&] { copy({y, x}, nullptr); });
  run("cast to fp32", 3 * matrix, [&] { copy({wider, x}, nullptr); });
  run("add", 3 * matrix, [&] { add({y, x}, nullptr); });
  run("rms_norm", 2 * matrix, [&] { rms_norm({.y = y, .rstd = rstd, .x = x, .w = w}, nullptr); });
  run("rms_norm_grad", 4 * matrix, [&] { rms_norm_grad({.dx = z, .dw = dw, .dy = y, .x = x, .rstd = rstd, .w = w, .scratch = scratch}, nullptr); });
  run("head_norm", 2 * matrix, [&] { head_norm({.y = y, .rstd = head_rstd, .x = x, .w = w, .head_size = H}, nullptr); });
  run("head_norm_grad", 3 * matrix,
      [&] { head_norm_grad({.dx = y, .dw = dw, .x = x, .rstd = head_rstd, .w = w, .head_size = H, .scratch = scratch}, nullptr); });
  run("rope", 2 * matrix, [&] { rope({.x = x, .table = table}, nullptr); });
  run("swiglu", 3 * matrix, [&] { swiglu({.a = x, .gate_up = wide}, nullptr); });
  run("swiglu_grad", 6 * matrix, [&] { swiglu_grad({.gate_up = wide, .a = x, .da = y}, nullptr); });
  run("add_bias", 2 * matrix, [&] { add_bias({y, w}, nullptr); });
  run("bias_grad", matrix, [&] { bias_grad({.db = dw, .dy = y, .scratch = scratch}, nullptr); });
  run("embed", 2 * matrix, [&] { embed({.h = x, .table = y, .ids = near_ids}, nullptr); });
  run("embed_grad", 5 * matrix, [&] { embed_grad({.dtable = dtable, .dh = y, .ids = ids}, nullptr); });
  const std::vector<PackedColumns> ranges = {{0, 2048, 0, 2560}, {2048, 512, 2048, 2560}, {2048, 512, 2560 * s, 2048}, {2560, 1536, 2560 * s + 512, 2048}};
  const PackArgs pack{.x = x, .packed = wide.data, .ranges = ranges.data(), .num_ranges = 4};
  run("pack_columns", 2.25 * matrix, [&] { pack_columns(pack, nullptr); });
  run("unpack_columns", 2.25 * matrix, [&] { unpack_columns(pack, nullptr); });
}

void run_loss_and_optimizer() {
  const int64_t t = 4096, V = 128256, n = int64_t{1} << 28;
  for (const Dtype dtype : {Dtype::kF32, Dtype::kBf16}) {
    const Matrix logits = make(t, V, dtype), loss = make(t, 1, Dtype::kF32), labels = make(t, 1, Dtype::kI64);
    run(dtype == Dtype::kF32 ? "loss fp32" : "loss bf16", 3.0 * static_cast<double>(t * V * (dtype == Dtype::kF32 ? 4 : 2)), [&] {
      cross_entropy({logits, loss, labels}, nullptr);
    });
    cudaFree(logits.data);
  }
  const Matrix master = make(1, n, Dtype::kF32), m = make(1, n, Dtype::kF32), v = make(1, n, Dtype::kF32), gradient = make(1, n, Dtype::kF32),
               weight = make(1, n, Dtype::kBf16);
  AdamwArgs a{.weight = weight.data, .weight_dtype = Dtype::kBf16, .count = n, .learning_rate = 1e-4, .weight_decay = 0.1};
  a.master = static_cast<float*>(master.data), a.m = static_cast<float*>(m.data), a.v = static_cast<float*>(v.data),
  a.gradient = static_cast<float*>(gradient.data);
  const Matrix total = make(1, 1, Dtype::kF64), scratch = make(1, kNormBlocks, Dtype::kF64);
  run("squared_norm", 4.0 * n, [&] { squared_norm({.total = static_cast<double*>(total.data), .x = gradient, .scratch = scratch.data}, nullptr); });
  a.squared_norm = static_cast<double*>(total.data), a.clip = 1;
  run("adamw", 34.0 * n, [&] { adamw(a, nullptr); });
  Matrix shard = master;
  shard.columns = shard.stride = n / 8;
  run("sum_pieces", 5.0 * n, [&] { sum_pieces({.shard = shard, .received = m, .pieces = 8}, nullptr); });
}

}  // namespace

int main() {
  run_activations();
  run_loss_and_optimizer();
  return cudaDeviceSynchronize() == cudaSuccess ? 0 : 1;
}
