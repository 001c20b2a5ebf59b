// Attention on a GPU against plain sums in double precision: documents that share calls and that stand alone, forward in
// blocks, backward in blocks and ranges of keys, heads that begin within a group. Without a GPU nothing is run, exit 0.
#include "engine/cuda/attention.h"

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>

#include "engine/cuda/memory.h"
#include "kernels/bf16.h"

namespace uly::engine::cuda {
namespace {

using kernels::Bf16;
using kernels::Matrix;

struct Case {
  const char* name;
  ops::Heads heads;
  std::vector<int64_t> lengths;
  ops::AttentionSchedule schedule;
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

// A matrix on host and device.
struct Both {
  Both(int64_t rows, int64_t columns, Dtype dtype, std::mt19937* random = nullptr) : host(static_cast<size_t>(rows * columns)), dtype(dtype), device(Place::kDevice, rows * columns * bytes_of(dtype)), rows(rows), columns(columns) {
    std::normal_distribution<float> normal;
    // What nobody has written is not a number.
    for (float& x : host) x = random ? kernels::to_float(kernels::to_bf16(normal(*random))) : std::nanf("");
    upload();
  }
  void upload() {
    if (dtype == Dtype::kF32) return check(cudaMemcpy(device.base(), host.data(), host.size() * 4, cudaMemcpyHostToDevice), "upload");
    std::vector<Bf16> bits;
    for (const float x : host) bits.push_back(kernels::to_bf16(x));
    check(cudaMemcpy(device.base(), bits.data(), bits.size() * 2, cudaMemcpyHostToDevice), "upload");
  }
  void download() {
    if (dtype == Dtype::kF32) return check(cudaMemcpy(host.data(), device.base(), host.size() * 4, cudaMemcpyDeviceToHost), "download");
    std::vector<Bf16> bits(host.size());
    check(cudaMemcpy(bits.data(), device.base(), bits.size() * 2, cudaMemcpyDeviceToHost), "download");
    for (size_t i = 0; i < bits.size(); ++i) host[i] = kernels::to_float(bits[i]);
  }
  double at(int64_t row, int64_t column) const { return static_cast<double>(host[static_cast<size_t>(row * columns + column)]); }
  Matrix matrix() const { return {.data = device.base(), .dtype = dtype, .rows = rows, .columns = columns, .stride = columns}; }

  std::vector<float> host;
  Dtype dtype;
  Memory device;
  int64_t rows, columns;
};

// What is expected, in double precision; rows of o, dq, dk, dv as in the matrices.
struct Truth {
  std::vector<double> o, dqkv;
};

Truth truth(const Case& c, const Both& qkv, const Both& d_o) {
  const ops::Heads& h = c.heads;
  const int64_t S = qkv.rows, H = h.H, width = qkv.columns;
  Truth t{std::vector<double>(static_cast<size_t>(S * h.n * H)), std::vector<double>(static_cast<size_t>(S * width))};
  const double scale = 1.0 / std::sqrt(static_cast<double>(H));
  int64_t first = 0;
  for (const int64_t length : c.lengths) {
    for (int64_t head = 0; head < h.n; ++head) {
      const int64_t kv = (h.first_head + head) / h.G - h.first_head / h.G, q_at = head * H, k_at = (h.n + kv) * H, v_at = (h.n + h.k + kv) * H;
      for (int64_t i = first; i < first + length; ++i) {
        std::vector<double> p(static_cast<size_t>(i - first + 1));
        double largest = -1e300, sum = 0;
        for (int64_t j = first; j <= i; ++j) {
          double s = 0;
          for (int64_t x = 0; x < H; ++x) s += qkv.at(i, q_at + x) * qkv.at(j, k_at + x);
          p[static_cast<size_t>(j - first)] = s * scale;
          largest = std::max(largest, s * scale);
        }
        for (double& x : p) sum += x = std::exp(x - largest);
        double delta = 0;
        for (int64_t x = 0; x < H; ++x) {
          double o = 0;
          for (int64_t j = first; j <= i; ++j) o += p[static_cast<size_t>(j - first)] / sum * qkv.at(j, v_at + x);
          t.o[static_cast<size_t>(i * h.n * H + q_at + x)] = o;
          delta += o * d_o.at(i, q_at + x);
        }
        for (int64_t j = first; j <= i; ++j) {
          const double weight = p[static_cast<size_t>(j - first)] / sum;
          double dp = 0;
          for (int64_t x = 0; x < H; ++x) dp += d_o.at(i, q_at + x) * qkv.at(j, v_at + x);
          const double ds = weight * (dp - delta) * scale;
          for (int64_t x = 0; x < H; ++x) {
            t.dqkv[static_cast<size_t>(i * width + q_at + x)] += ds * qkv.at(j, k_at + x);
            t.dqkv[static_cast<size_t>(j * width + k_at + x)] += ds * qkv.at(i, q_at + x);
            t.dqkv[static_cast<size_t>(j * width + v_at + x)] += weight * d_o.at(i, q_at + x);
          }
        }
      }
    }
    first += length;
  }
  return t;
}

// Relative to the norm.
double difference(const std::vector<float>& found, const std::vector<double>& expected) {
  double apart = 0, norm = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    const double d = static_cast<double>(found[i]) - expected[i];
    apart += d * d, norm += expected[i] * expected[i];
  }
  return std::sqrt(apart / norm);
}

class AttentionGpuTest : public testing::TestWithParam<Case> {};

TEST_P(AttentionGpuTest, EqualsPlainSums) {
  const Case& c = GetParam();
  std::mt19937 random(11);
  std::vector<int64_t> starts{0};
  for (const int64_t length : c.lengths) starts.push_back(starts.back() + length);
  const int64_t S = starts.back();
  Both qkv(S, (c.heads.n + 2 * c.heads.k) * c.heads.H, Dtype::kBf16, &random), d_o(S, c.heads.n * c.heads.H, Dtype::kBf16, &random);
  Both o(S, c.heads.n * c.heads.H, Dtype::kBf16), lse(S, c.heads.n, Dtype::kF32), dqkv(S, qkv.columns, Dtype::kBf16);
  const int64_t bytes = std::max(ops::attention_workspace_bytes(c.schedule, c.heads, S), ops::attention_grad_workspace_bytes(c.schedule, c.heads, S));
  const Memory workspace(Place::kDevice, bytes), table(Place::kDevice, ops::document_table_bytes(c.schedule, S));
  check(cudaMemset(workspace.base(), 0xff, static_cast<size_t>(bytes)), "poison");
  AttentionArgs args{.qkv = qkv.matrix(), .o = o.matrix(), .lse = lse.matrix(), .dqkv = {}, .d_o = {}, .workspace = {.data = workspace.base(), .dtype = Dtype::kU8, .rows = 1, .columns = bytes, .stride = bytes}, .heads = c.heads, .schedule = c.schedule};
  cudaStream_t stream = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  {
    Attention attention(stream);
    const std::vector<std::byte> image = attention.plan(starts, args, table.base());
    check(cudaMemcpy(table.base(), image.data(), image.size(), cudaMemcpyHostToDevice), "table");
    attention.forward(args);
    args.dqkv = dqkv.matrix(), args.d_o = d_o.matrix();
    attention.backward(args);
    check(cudaStreamSynchronize(stream), "attention");
  }
  check(cudaStreamDestroy(stream), "stream");
  o.download(), dqkv.download();
  const Truth expected = truth(c, qkv, d_o);
  EXPECT_LT(difference(o.host, expected.o), 5e-3);
  EXPECT_LT(difference(dqkv.host, expected.dqkv), 1e-2);
}

ops::AttentionSchedule schedule(int64_t kv_heads, int64_t forward_block, int64_t queries, int64_t keys, bool deterministic = false, int64_t summed_bytes = int64_t{2} << 30) {
  return {.backend = ops::AttentionBackend::kCudnn, .kv_heads_at_once = kv_heads, .forward_block = forward_block, .backward_queries = queries, .backward_keys = keys, .summed_bytes = summed_bytes, .deterministic = deterministic};
}

constexpr ops::Heads kGrouped{.n = 4, .k = 2, .H = 64, .G = 2};
constexpr ops::Heads kUneven{.n = 5, .k = 3, .H = 64, .G = 3, .first_head = 2};  // 1 | 3 | 1 of groups of 3

INSTANTIATE_TEST_SUITE_P(
    Layouts, AttentionGpuTest,
    testing::Values(Case{"shared", kGrouped, {1, 130, 7, 64, 300, 5, 33}, schedule(2, 32768, 0, 0)}, Case{"alone", kGrouped, {2048}, schedule(2, 32768, 0, 0)},
                    Case{"one head group at a time", kGrouped, {2048, 17, 90}, schedule(1, 32768, 0, 0)}, Case{"forward in blocks", kGrouped, {2048}, schedule(2, 512, 0, 0)},
                    Case{"forward and backward in ragged blocks", kGrouped, {700, 3, 128, 391}, schedule(2, 256, 128, 256)},
                    Case{"deterministic", kGrouped, {700, 3, 128, 391}, schedule(1, 256, 128, 128, true)},
                    Case{"two ranges of keys and more", kGrouped, {1100, 60}, schedule(2, 256, 128, 256, false, 256 * 2 * 64 * 2 * 4)},
                    Case{"uneven heads", kUneven, {300, 41, 2}, schedule(8, 32768, 0, 0)}, Case{"uneven heads in blocks", kUneven, {520, 41}, schedule(8, 128, 128, 128)},
                    Case{"heads of 128", {.n = 8, .k = 1, .H = 128, .G = 8}, {513, 200, 769}, schedule(1, 256, 256, 256)},
                    Case{"a last query alone in its block and its range of keys", kGrouped, {513}, schedule(2, 256, 128, 256, false, 256 * 2 * 64 * 2 * 4)}, Case{"heads of 96", {.n = 2, .k = 2, .H = 96, .G = 1}, {400, 90}, schedule(2, 256, 128, 128)},
                    Case{"heads of 256", {.n = 2, .k = 1, .H = 256, .G = 2}, {300, 90}, schedule(1, 256, 0, 0)}),
    [](const auto& info) {
      std::string name = info.param.name;
      for (char& letter : name)
        if (letter == ' ') letter = '_';
      return name;
    });

}  // namespace
}  // namespace uly::engine::cuda

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    std::puts("no GPU: nothing was run");
    return 0;
  }
  return RUN_ALL_TESTS();
}
