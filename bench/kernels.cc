// Measures each CUDA kernel on random data much larger than any cache: the bytes that it must move over the median time of
// 21 runs, beside the rate of a plain device copy in the same process. A JSON object a line, then those below 0.90 of it.
//
//   g++ -std=c++20 -O2 -Isrc -I$CUDA/include bench/kernels.cc build/libuly_kernels.a build/libuly_base.a
//       $CUDA/lib/libcudart_static.a -lfmt -ldl -lrt -lpthread -o kernels && ./kernels
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "kernels/access.h"
#include "kernels/elementwise.h"
#include "kernels/embed.h"
#include "kernels/exchange.h"
#include "kernels/loss.h"
#include "kernels/merge.h"
#include "kernels/norm.h"
#include "kernels/norm_rope.h"
#include "kernels/optimizer.h"
#include "kernels/rope.h"
#include "kernels/swiglu.h"

namespace {

using namespace uly;
using namespace uly::kernels;

constexpr int64_t kTokens = 65536;
constexpr int kRuns = 21;

void must(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

int64_t size_of(Dtype dtype) { return dtype == Dtype::kBf16 || dtype == Dtype::kI16 ? 2 : dtype == Dtype::kF32 ? 4 : 8; }

// Device memory of one group of kernels.
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() {
    for (void* p : all_) cudaFree(p);
  }
  // Zeros.
  Matrix zeros(int64_t rows, int64_t columns, Dtype dtype) {
    Matrix m{.data = nullptr, .dtype = dtype, .rows = rows, .columns = columns, .stride = columns};
    must(cudaMalloc(&m.data, static_cast<size_t>(rows * columns * size_of(dtype))));
    must(cudaMemset(m.data, 0, static_cast<size_t>(rows * columns * size_of(dtype))));
    all_.push_back(m.data);
    return m;
  }
  // Normal numbers, a million of them over and over; kI16: any bits.
  Matrix random(int64_t rows, int64_t columns, Dtype dtype, float scale = 1) {
    const Matrix m = zeros(rows, columns, dtype);
    std::normal_distribution<float> normal(0, scale);
    std::vector<float> some((1 << 20) + 7);
    for (float& x : some) x = normal(engine_);
    std::vector<char> bytes(some.size() * static_cast<size_t>(size_of(dtype)));
    for (size_t i = 0; i < some.size(); ++i) {
      if (dtype == Dtype::kF32)
        reinterpret_cast<float*>(bytes.data())[i] = some[i];
      else if (dtype == Dtype::kBf16)
        reinterpret_cast<Bf16*>(bytes.data())[i] = to_bf16(some[i]);
      else
        reinterpret_cast<uint16_t*>(bytes.data())[i] = static_cast<uint16_t>(engine_());
    }
    const size_t all = static_cast<size_t>(rows * columns * size_of(dtype));
    for (size_t at = 0; at < all; at += bytes.size())
      must(cudaMemcpy(static_cast<char*>(m.data) + at, bytes.data(), std::min(bytes.size(), all - at), cudaMemcpyHostToDevice));
    return m;
  }
  Matrix positive(int64_t rows, int64_t columns) {
    const Matrix m = zeros(rows, columns, Dtype::kF32);
    std::vector<float> host(static_cast<size_t>(rows * columns));
    for (float& x : host) x = 0.5f + static_cast<float>(engine_() % 1024) / 1024.0f;
    must(cudaMemcpy(m.data, host.data(), host.size() * 4, cudaMemcpyHostToDevice));
    return m;
  }
  Matrix ids(int64_t rows, int64_t below) {
    const Matrix m = zeros(rows, 1, Dtype::kI64);
    std::vector<int64_t> host(static_cast<size_t>(rows));
    for (int64_t& x : host) x = static_cast<int64_t>(engine_()) % below;
    must(cudaMemcpy(m.data, host.data(), host.size() * 8, cudaMemcpyHostToDevice));
    return m;
  }

 private:
  std::vector<void*> all_;
  std::mt19937 engine_{1};
};

class Bench {
 public:
  // Times f; `before` runs untimed each time, to restore what f overwrites.
  void run(const std::string& name, double bytes, const std::function<void()>& f, const std::function<void()>& before = {}) {
    cudaEvent_t start, stop;
    must(cudaEventCreate(&start)), must(cudaEventCreate(&stop));
    std::vector<float> times;
    for (int i = 0; i < kRuns + 3; ++i) {
      float milliseconds = 0;
      if (before) before();
      must(cudaEventRecord(start)), f(), must(cudaEventRecord(stop)), must(cudaEventSynchronize(stop));
      must(cudaEventElapsedTime(&milliseconds, start, stop));
      if (i >= 3) times.push_back(milliseconds);
    }
    must(cudaEventDestroy(start)), must(cudaEventDestroy(stop));
    std::nth_element(times.begin(), times.begin() + kRuns / 2, times.end());
    const double milliseconds = static_cast<double>(times[kRuns / 2]), rate = bytes / milliseconds / 1e6;
    if (copy_rate_ == 0) copy_rate_ = rate;
    std::printf("{\"kernel\": \"%s\", \"gb_per_second\": %.0f, \"of_copy\": %.3f, \"milliseconds\": %.4f, \"bytes\": %.0f}\n", name.c_str(), rate,
                rate / copy_rate_, milliseconds, bytes);
    std::fflush(stdout);
    if (rate < 0.9 * copy_rate_) slow_.push_back(name);
  }
  void finish() const {
    std::string names;
    for (const std::string& name : slow_) names += (names.empty() ? "\"" : ", \"") + name + "\"";
    std::printf("{\"below_0.90_of_copy\": [%s]}\n", names.c_str());
  }

 private:
  double copy_rate_ = 0;  // of the first that is run
  std::vector<std::string> slow_;
};

double bytes_in(const Matrix& m) { return static_cast<double>(m.elements() * size_of(m.dtype)); }

Matrix with_columns(Matrix m, int64_t columns) {
  m.columns = columns;
  return m;
}

void run_elementwise(Bench& bench) {
  Arena arena;
  const int64_t s = kTokens, D = 4096;
  const Matrix x = arena.random(s, D, Dtype::kBf16), y = arena.random(s, D, Dtype::kBf16), w = arena.random(1, D, Dtype::kBf16),
               wide = arena.random(s, D, Dtype::kF32), db = arena.zeros(1, D, Dtype::kF32);
  const Matrix joint = arena.random(s, 6144, Dtype::kBf16);
  void* scratch = arena.zeros(1, column_sum_scratch_bytes(s, D), Dtype::kBf16).data;
  const double matrix = bytes_in(x);
  bench.run("copy", 2 * matrix, [&] { copy({y, x}, nullptr); });
  bench.run("copy_strided", 2 * matrix, [&] { copy({with_columns(joint, D), x}, nullptr); });
  bench.run("copy_bf16_to_fp32", 3 * matrix, [&] { copy({wide, x}, nullptr); });
  bench.run("copy_fp32_to_bf16", 3 * matrix, [&] { copy({y, wide}, nullptr); });
  bench.run("zero", matrix, [&] { zero(y, nullptr); });
  copy({y, x}, nullptr);
  bench.run("add", 3 * matrix, [&] { add({y, x}, nullptr); });
  bench.run("add_bf16_to_fp32", 5 * matrix, [&] { add({wide, x}, nullptr); });
  bench.run("add_bias", 2 * matrix, [&] { add_bias({y, w}, nullptr); });
  bench.run("bias_grad", matrix, [&] { bias_grad({.db = db, .dy = x, .scratch = scratch}, nullptr); });
}

void run_norms(Bench& bench, int64_t s, int64_t D) {
  Arena arena;
  const Matrix x = arena.random(s, D, Dtype::kBf16), dy = arena.random(s, D, Dtype::kBf16), dx = arena.random(s, D, Dtype::kBf16),
               w = arena.random(1, D, Dtype::kBf16), dw = arena.zeros(1, D, Dtype::kF32), rstd = arena.positive(s, 1);
  void* scratch = arena.zeros(1, column_sum_scratch_bytes(s, D), Dtype::kBf16).data;
  const std::string size = "_" + std::to_string(s) + "x" + std::to_string(D);
  bench.run("rms_norm" + size, 2 * bytes_in(x), [&] { rms_norm({.y = dx, .rstd = rstd, .x = x, .w = w}, nullptr); });
  bench.run("rms_norm_grad" + size, 4 * bytes_in(x),
            [&] { rms_norm_grad({.dx = dx, .dw = dw, .dy = dy, .x = x, .rstd = rstd, .w = w, .scratch = scratch}, nullptr); });
}

void run_heads(Bench& bench, int64_t n, int64_t H) {
  Arena arena;
  const int64_t s = kTokens;
  const Matrix x = arena.random(s, n * H, Dtype::kBf16), y = arena.random(s, n * H, Dtype::kBf16), raw = arena.random(s, n * H, Dtype::kBf16),
               w = arena.random(1, H, Dtype::kBf16), dw = arena.zeros(1, H, Dtype::kF32), rstd = arena.positive(s, n),
               table = arena.random(s, H, Dtype::kF32, 0.7f);
  void* scratch = arena.zeros(1, column_sum_scratch_bytes(s * n, H), Dtype::kBf16).data;
  const std::string size = "_" + std::to_string(n) + "x" + std::to_string(H);
  const double matrix = bytes_in(x), besides = bytes_in(rstd) + bytes_in(table);
  bench.run("norm_rope" + size, 2 * matrix + besides, [&] { norm_rope({.y = y, .rstd = rstd, .x = x, .w = w, .table = table, .head_size = H}, nullptr); });
  bench.run("norm_rope_raw" + size, 3 * matrix + besides,
            [&] { norm_rope({.y = y, .raw = raw, .rstd = rstd, .x = x, .w = w, .table = table, .head_size = H}, nullptr); });
  bench.run(
      "norm_rope_grad" + size, 3 * matrix + besides,
      [&] { norm_rope_grad({.dx = y, .dw = dw, .x = x, .rstd = rstd, .w = w, .table = table, .head_size = H, .scratch = scratch}, nullptr); },
      [&] {
        copy({y, raw}, nullptr);
      });
  bench.run(
      "rope" + size, 2 * matrix + bytes_in(table), [&] { rope({.x = y, .table = table}, nullptr); },
      [&] {
        copy({y, x}, nullptr);
      });
}

void run_rope_table(Bench& bench) {
  Arena arena;
  const int64_t s = 1 << 20, H = 128;
  const Matrix table = arena.zeros(s, H, Dtype::kF32), positions = arena.ids(s, 100000), inv_freq = arena.zeros(1, H / 2, Dtype::kF32);
  std::vector<float> host;
  for (int64_t j = 0; j < H / 2; ++j) host.push_back(std::pow(500000.0f, -static_cast<float>(j) / static_cast<float>(H / 2)));
  must(cudaMemcpy(inv_freq.data, host.data(), host.size() * 4, cudaMemcpyHostToDevice));
  bench.run("rope_table", bytes_in(table) + bytes_in(positions),
            [&] { rope_table({.table = table, .positions = positions, .inv_freq = static_cast<float*>(inv_freq.data)}, nullptr); });
}

void run_merge(Bench& bench, const char* name, Dtype y_type, Dtype a_type, Dtype b_type, bool in_place, bool transposed) {
  Arena arena;
  const int64_t s = kTokens, n = 32, H = 128;
  const Matrix a = arena.random(s, n * H, a_type), b = arena.random(s, n * H, b_type), a_lse = arena.random(s, n, Dtype::kF32),
               b_lse = arena.random(s, n, Dtype::kF32);
  const Matrix y = in_place ? a : arena.zeros(s, n * H, y_type), lse = in_place ? a_lse : arena.zeros(s, n, Dtype::kF32);
  const auto lse_of = [&](Matrix m) {
    if (transposed) m.stride = 1;
    return m;
  };
  const int64_t column_stride = transposed ? s : 1;
  const MergeArgs args{.y = y,
                       .lse = lse_of(lse),
                       .a = a,
                       .a_lse = lse_of(a_lse),
                       .b = b,
                       .b_lse = lse_of(b_lse),
                       .head_size = H,
                       .lse_column_stride = column_stride,
                       .a_lse_column_stride = column_stride,
                       .b_lse_column_stride = column_stride};
  bench.run(name, bytes_in(y) + bytes_in(a) + bytes_in(b) + 3 * bytes_in(lse), [&] { merge(args, nullptr); });
}

void run_mlp_and_exchange(Bench& bench) {
  Arena arena;
  const int64_t s = kTokens, D = 4096;
  const Matrix x = arena.random(s, D, Dtype::kBf16), wide = arena.random(s, 2 * D, Dtype::kBf16), kept = arena.random(s, 2 * D, Dtype::kBf16),
               y = arena.random(s, D, Dtype::kBf16);
  const double matrix = bytes_in(x);
  bench.run("swiglu", 3 * matrix, [&] { swiglu({.a = y, .gate_up = wide}, nullptr); });
  bench.run(
      "swiglu_grad", 6 * matrix, [&] { swiglu_grad({.gate_up = wide, .a = y, .da = x}, nullptr); },
      [&] {
        copy({wide, kept}, nullptr);
      });
  const std::vector<PackedColumns> ranges = {{0, 2048, 0, 2560}, {2048, 512, 2048, 2560}, {2048, 512, 2560 * s, 2048}, {2560, 1536, 2560 * s + 512, 2048}};
  const PackArgs pack{.x = x, .packed = wide.data, .ranges = ranges.data(), .num_ranges = 4};
  bench.run("pack_columns", 2.25 * matrix, [&] { pack_columns(pack, nullptr); });
  bench.run("unpack_columns", 2.125 * matrix, [&] { unpack_columns(pack, nullptr); });
}

void run_embed(Bench& bench) {
  Arena arena;
  const int64_t s = kTokens, D = 4096, V = 128256;
  const Matrix h = arena.random(s, D, Dtype::kBf16), table = arena.random(V, D, Dtype::kBf16), dtable = arena.random(V, D, Dtype::kF32), ids = arena.ids(s, V);
  bench.run("embed", 2 * bytes_in(h), [&] { embed({.h = h, .table = table, .ids = ids}, nullptr); });
  bench.run("embed_grad", 5 * bytes_in(h), [&] { embed_grad({.dtable = dtable, .dh = h, .ids = ids}, nullptr); });
}

void run_loss(Bench& bench, const char* name, Dtype dtype) {
  Arena arena;
  const int64_t t = 4096, V = 128256;
  const Matrix logits = arena.zeros(t, V, dtype), kept = arena.random(t, V, dtype, 3), loss = arena.zeros(t, 1, Dtype::kF32), labels = arena.ids(t, V);
  bench.run(
      name, 3 * bytes_in(logits),
      [&] {
        cross_entropy({logits, loss, labels}, nullptr);
      },
      [&] {
        copy({logits, kept}, nullptr);
      });
}

void run_optimizer(Bench& bench) {
  Arena arena;
  const int64_t n = int64_t{1} << 28;
  const Matrix master = arena.random(1, n, Dtype::kF32), m = arena.zeros(1, n, Dtype::kF32), v = arena.zeros(1, n, Dtype::kF32),
               gradient = arena.random(1, n, Dtype::kF32), kept = arena.random(1, n, Dtype::kF32), weight = arena.random(1, n, Dtype::kBf16),
               low = arena.random(1, n, Dtype::kI16), total = arena.zeros(1, 1, Dtype::kF64), loss = arena.zeros(1, 1, Dtype::kF64),
               scratch = arena.zeros(1, kNormBlocks, Dtype::kF64);
  for (const Matrix& x : {gradient, weight})
    bench.run(x.dtype == Dtype::kF32 ? "squared_norm_fp32" : "squared_norm_bf16", bytes_in(x),
              [&] { squared_norm({.total = static_cast<double*>(total.data), .x = x, .scratch = scratch.data}, nullptr); });
  AdamwArgs a{.weight = weight.data, .weight_dtype = Dtype::kBf16, .count = n, .clip = 1, .learning_rate = 1e-4, .weight_decay = 0.1};
  a.m = static_cast<float*>(m.data), a.v = static_cast<float*>(v.data), a.gradient = static_cast<float*>(gradient.data);
  a.squared_norm = static_cast<double*>(total.data), a.loss = static_cast<double*>(loss.data);
  const auto restore = [&] { copy({gradient, kept}, nullptr); };
  a.low = static_cast<int16_t*>(low.data);
  bench.run(
      "adamw_split_master", 32.0 * n, [&] { adamw(a, nullptr); }, restore);
  a.low = nullptr, a.master = static_cast<float*>(master.data);
  bench.run(
      "adamw_bf16_weight", 34.0 * n, [&] { adamw(a, nullptr); }, restore);
  a.weight = a.master, a.weight_dtype = Dtype::kF32;
  bench.run(
      "adamw_fp32", 32.0 * n, [&] { adamw(a, nullptr); }, restore);
  Matrix shard = master;
  shard.columns = shard.stride = n / 8;
  bench.run("sum_pieces_fp32", 4.0 * n + 8.0 * n / 8, [&] { sum_pieces({.shard = shard, .received = kept, .pieces = 8}, nullptr); });
  bench.run("sum_pieces_bf16", 2.0 * n + 8.0 * n / 8, [&] { sum_pieces({.shard = shard, .received = weight, .pieces = 8}, nullptr); });
}

}  // namespace

int main() {
  Bench bench;
  run_elementwise(bench);
  for (const int64_t D : {2048, 4096, 5120, 8192}) run_norms(bench, kTokens, D);
  run_norms(bench, 4096, 4096);
  for (const auto& [n, H] : {std::pair<int64_t, int64_t>{32, 128}, {8, 128}, {32, 64}, {32, 96}, {16, 256}}) run_heads(bench, n, H);
  run_rope_table(bench);
  run_merge(bench, "merge_bf16", Dtype::kBf16, Dtype::kBf16, Dtype::kBf16, false, false);
  run_merge(bench, "merge_bf16_into_fp32", Dtype::kF32, Dtype::kF32, Dtype::kBf16, true, false);
  run_merge(bench, "merge_bf16_into_fp32_transposed_lse", Dtype::kF32, Dtype::kF32, Dtype::kBf16, true, true);
  run_merge(bench, "merge_fp32_and_bf16_to_bf16", Dtype::kBf16, Dtype::kF32, Dtype::kBf16, false, false);
  run_mlp_and_exchange(bench);
  run_embed(bench);
  run_loss(bench, "cross_entropy_bf16", Dtype::kBf16);
  run_loss(bench, "cross_entropy_fp32", Dtype::kF32);
  run_optimizer(bench);
  bench.finish();
  must(cudaDeviceSynchronize());
}
