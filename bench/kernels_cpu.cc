// Prints the rate of each CPU kernel on one thread, counting the bytes that it must move. Give a name to run one.
//
//   g++ -std=c++20 -O3 -Isrc bench/kernels_cpu.cc build/libuly_kernels.a -o kernels_cpu && ./kernels_cpu [name]
#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "kernels/access.h"
#include "kernels/elementwise.h"
#include "kernels/embed.h"
#include "kernels/exchange.h"
#include "kernels/loss.h"
#include "kernels/norm.h"
#include "kernels/norm_rope.h"
#include "kernels/optimizer.h"
#include "kernels/rope.h"
#include "kernels/swiglu.h"

namespace {

using namespace uly;
using namespace uly::kernels;

struct Storage {
  std::vector<char> bytes;
  Matrix m;
  Storage(int64_t rows, int64_t columns, Dtype dtype) : bytes(static_cast<size_t>(rows * columns * (dtype == Dtype::kF64 || dtype == Dtype::kI64 ? 8 : 4))) {
    m = {.data = bytes.data(), .dtype = dtype, .rows = rows, .columns = columns, .stride = columns};
    std::mt19937 random(1);
    std::uniform_real_distribution<float> uniform(-1, 1);
    for (int64_t i = 0; i < rows * columns; ++i) {
      if (dtype == Dtype::kF32) static_cast<float*>(m.data)[i] = uniform(random);
      if (dtype == Dtype::kBf16) static_cast<Bf16*>(m.data)[i] = to_bf16(uniform(random));
      if (dtype == Dtype::kI64) static_cast<int64_t*>(m.data)[i] = i % 1000;
    }
  }
};

class Bench {
 public:
  explicit Bench(const char* only) : only_(only) {}
  void run(const std::string& name, double bytes, const std::function<void()>& f) {
    if (only_ != nullptr && name.find(only_) == std::string::npos) return;
    f();
    double best = 1e30;
    for (int i = 0; i < 7; ++i) {
      const auto start = std::chrono::steady_clock::now();
      f();
      best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    std::printf("%-24s %7.2f GB/s  %8.3f ms\n", name.c_str(), bytes / best / 1e9, best * 1e3);
  }

 private:
  const char* only_;
};

void run_rows(Bench& bench, Dtype dtype, const std::string& suffix) {
  const int64_t s = 1024, D = 4096, H = 128, size = bytes_of(dtype);
  const double matrix = static_cast<double>(s * D * size);
  Storage x(s, D, dtype), y(s, D, dtype), z(s, D, dtype), wide(s, 2 * D, dtype), w(1, D, dtype), dw(1, D, Dtype::kF32), rstd(s, D / H, Dtype::kF32),
      table(s, H, Dtype::kF32);
  Storage logits(32, 128256, dtype), loss(32, 1, Dtype::kF32), labels(32, 1, Dtype::kI64), ids(s, 1, Dtype::kI64), dtable(1000, D, Dtype::kF32);
  Matrix row_rstd = rstd.m;
  row_rstd.columns = 1;
  bench.run("copy" + suffix, 2 * matrix, [&] { cpu::copy({y.m, x.m}, 0, s * D); });
  bench.run("add" + suffix, 3 * matrix, [&] { cpu::add({y.m, x.m}, 0, s * D); });
  bench.run("rms_norm" + suffix, 2 * matrix, [&] { cpu::rms_norm({.y = y.m, .rstd = row_rstd, .x = x.m, .w = w.m}, 0, s); });
  const RmsNormGradArgs rms{.dx = z.m, .dw = dw.m, .dy = y.m, .x = x.m, .rstd = row_rstd, .w = w.m};
  bench.run("rms_norm_grad_dx" + suffix, 4 * matrix, [&] { cpu::rms_norm_grad_dx(rms, 0, s); });
  bench.run("rms_norm_grad_dw" + suffix, 2 * matrix, [&] { cpu::rms_norm_grad_dw(rms, 0, D); });
  bench.run("norm_rope" + suffix, 2 * matrix, [&] { cpu::norm_rope({.y = y.m, .rstd = rstd.m, .x = x.m, .w = w.m, .table = table.m, .head_size = H}, 0, s); });
  const NormRopeGradArgs head{.dx = y.m, .dw = dw.m, .x = x.m, .rstd = rstd.m, .w = w.m, .table = table.m, .head_size = H};
  bench.run("norm_rope_grad_dx" + suffix, 3 * matrix, [&] { cpu::norm_rope_grad_dx(head, 0, s); });
  bench.run("norm_rope_grad_dw" + suffix, 2 * matrix, [&] { cpu::norm_rope_grad_dw(head, 0, H); });
  bench.run("rope" + suffix, 2 * matrix, [&] { cpu::rope({.x = x.m, .table = table.m}, 0, s); });
  bench.run("swiglu" + suffix, 3 * matrix, [&] { cpu::swiglu({.a = x.m, .gate_up = wide.m}, 0, s); });
  bench.run("swiglu_grad" + suffix, 6 * matrix, [&] { cpu::swiglu_grad({.gate_up = wide.m, .a = x.m, .da = y.m}, 0, s); });
  bench.run("add_bias" + suffix, 2 * matrix, [&] { cpu::add_bias({y.m, w.m}, 0, s); });
  bench.run("bias_grad" + suffix, matrix, [&] { cpu::bias_grad({.db = dw.m, .dy = y.m}, 0, D); });
  bench.run("cross_entropy" + suffix, 3.0 * static_cast<double>(32 * 128256 * size), [&] { cpu::cross_entropy({logits.m, loss.m, labels.m}, 0, 32); });
  bench.run("embed" + suffix, 2 * matrix, [&] { cpu::embed({.h = x.m, .table = y.m, .ids = ids.m}, 0, s); });
  bench.run("embed_grad" + suffix, matrix + 8.0 * static_cast<double>(s * D), [&] { cpu::embed_grad({.dtable = dtable.m, .dh = y.m, .ids = ids.m}, 0, D); });
  const std::vector<PackedColumns> ranges = {{0, 2048, 0, 2560}, {2048, 512, 2048, 2560}, {2048, 512, 2560 * s, 2048}, {2560, 1536, 2560 * s + 512, 2048}};
  const PackArgs pack{.x = x.m, .packed = wide.m.data, .ranges = ranges.data(), .num_ranges = 4};
  bench.run("pack_columns" + suffix, 2 * matrix, [&] { cpu::pack_columns(pack, 0, s); });
  bench.run("unpack_columns" + suffix, 2 * matrix, [&] { cpu::unpack_columns(pack, 0, s); });
}

void run_flat(Bench& bench) {
  const int64_t n = 8 << 20;
  Storage master(1, n, Dtype::kF32), m(1, n, Dtype::kF32), v(1, n, Dtype::kF32), gradient(1, n, Dtype::kF32), weight(1, n, Dtype::kBf16),
      scratch(1, kNormBlocks, Dtype::kF64);
  std::memset(v.m.data, 0, v.bytes.size());
  double total = 0;
  AdamwArgs a{.weight = weight.m.data, .weight_dtype = Dtype::kBf16, .count = n, .learning_rate = 1e-4, .weight_decay = 0.1};
  a.master = static_cast<float*>(master.m.data), a.m = static_cast<float*>(m.m.data), a.v = static_cast<float*>(v.m.data),
  a.gradient = static_cast<float*>(gradient.m.data);
  bench.run("adamw", 34.0 * n, [&] { cpu::adamw(a, 0, n); });
  bench.run("squared_norm", 4.0 * n, [&] { cpu::squared_norm_blocks({.total = &total, .x = m.m, .scratch = scratch.m.data}, 0, kNormBlocks); });
  Matrix shard = m.m;
  shard.columns = n / 4;
  bench.run("sum_pieces", 6.0 * n, [&] { cpu::sum_pieces({.shard = shard, .received = master.m, .pieces = 4}, 0, n / 4); });
}

}  // namespace

int main(int argc, char** argv) {
  Bench bench(argc > 1 ? argv[1] : nullptr);
  run_rows(bench, Dtype::kBf16, " bf16");
  run_rows(bench, Dtype::kF32, " fp32");
  run_flat(bench);
}
