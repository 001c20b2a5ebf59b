// What the libraries under the engine reach on this GPU, by shape: attention forward and backward by cuDNN, whole and in
// blocks, all heads or few at a time, dense or ragged; and GEMMs of an 8B model by cuBLASLt. One JSON object a line.
#include <cuda_runtime.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "engine/cuda/gemm.h"
#include "engine/cuda/sdpa.h"
#include "kernels/bf16.h"

namespace {

using namespace uly;
using namespace uly::engine::cuda;

void must(cudaError_t e) {
  if (e == cudaSuccess) return;
  fmt::print(stderr, "{}\n", cudaGetErrorString(e));
  std::exit(75);
}

std::vector<kernels::Bf16> noise() {
  std::vector<kernels::Bf16> v(size_t{1} << 24);
  std::mt19937 engine(1);
  std::normal_distribution<float> normal;
  for (auto& x : v) x = kernels::to_bf16(normal(engine));
  return v;
}

void* device(int64_t bytes) {
  void* p = nullptr;
  must(cudaMalloc(&p, static_cast<size_t>(bytes)));
  return p;
}

void* random_bf16(int64_t elements) {
  static const std::vector<kernels::Bf16> v = noise();
  char* p = static_cast<char*>(device(elements * 2));
  for (int64_t at = 0; at < elements; at += static_cast<int64_t>(v.size()))
    must(cudaMemcpy(p + at * 2, v.data(), static_cast<size_t>(std::min<int64_t>(elements - at, static_cast<int64_t>(v.size()))) * 2, cudaMemcpyHostToDevice));
  return p;
}

cudaStream_t stream;

// Seconds a call, over at least `least` seconds.
double seconds(double least, const std::function<void()>& f) {
  cudaEvent_t a, b;
  must(cudaEventCreate(&a)), must(cudaEventCreate(&b));
  f();
  must(cudaStreamSynchronize(stream));
  double total = 0;
  int64_t calls = 0;
  while (total < least) {
    must(cudaEventRecord(a, stream));
    f();
    must(cudaEventRecord(b, stream));
    must(cudaEventSynchronize(b));
    float ms = 0;
    must(cudaEventElapsedTime(&ms, a, b));
    total += static_cast<double>(ms) / 1e3, ++calls;
  }
  return total / static_cast<double>(calls);
}

constexpr int64_t kN = 32, kK = 8;

struct Attention {
  int64_t S, H, row_elements = (kN + 2 * kK) * H;
  char *qkv, *o, *d_o, *dqkv, *workspace;
  float* lse;
  int64_t workspace_bytes;
  Sdpa& sdpa;

  Attention(Sdpa& s, int64_t tokens, int64_t workspace_size, int64_t head_size = 128) : S(tokens), H(head_size), workspace_bytes(workspace_size), sdpa(s) {
    qkv = static_cast<char*>(random_bf16(S * row_elements));
    o = static_cast<char*>(random_bf16(S * kN * H));
    d_o = static_cast<char*>(random_bf16(S * kN * H));
    dqkv = static_cast<char*>(device(S * row_elements * 2));
    lse = static_cast<float*>(device(S * kN * 4));
    workspace = static_cast<char*>(device(workspace_bytes));
  }
  ~Attention() {
    for (void* p : {static_cast<void*>(qkv), static_cast<void*>(o), static_cast<void*>(d_o), static_cast<void*>(dqkv), static_cast<void*>(lse), static_cast<void*>(workspace)}) cudaFree(p);
  }

  SdpaShape shape(int64_t queries, int64_t keys, int64_t k, Mask mask) const {
    return {.slots = 1, .queries = queries, .keys = keys, .n = k * kN / kK, .k = k, .H = H, .q_stride = row_elements, .kv_stride = row_elements, .o_stride = kN * H, .lse_stride = kN, .mask = mask};
  }
  SdpaPointers at(int64_t query, int64_t key, int64_t kv_head) const {
    const int64_t q_head = kv_head * kN / kK;
    const auto in = [&](char* base, int64_t row, int64_t stride, int64_t column) { return base + 2 * (row * stride + column * H); };
    SdpaPointers p;
    p.q = in(qkv, query, row_elements, q_head), p.k = in(qkv, key, row_elements, kN + kv_head), p.v = in(qkv, key, row_elements, kN + kK + kv_head);
    p.dq = in(dqkv, query, row_elements, q_head), p.dk = in(dqkv, key, row_elements, kN + kv_head), p.dv = in(dqkv, key, row_elements, kN + kK + kv_head);
    p.o = in(o, query, kN * H, q_head), p.d_o = in(d_o, query, kN * H, q_head);
    p.lse = lse + query * kN + q_head * (S - query);
    return p;
  }
  void row(const char* what, const SdpaShape& s, double flops, double t, int64_t ws) const {
    fmt::print("{{\"what\": \"{}\", \"queries\": {}, \"keys\": {}, \"heads\": {}, \"head_size\": {}, \"mask\": \"{}\", \"ragged\": {}, \"deterministic\": {}, \"tflops\": {:.0f}, \"ms\": {:.2f}, \"workspace_gib\": {:.3f}}}\n", what, s.queries, s.keys, s.n, s.H,
               s.mask == Mask::kCausal ? "causal" : "full", s.ragged, s.deterministic, flops / t / 1e12, t * 1e3, static_cast<double>(ws) / 1073741824.0);
    std::fflush(stdout);
  }
  static double flops(const SdpaShape& s) {
    return (s.mask == Mask::kCausal ? 2.0 : 4.0) * static_cast<double>(s.queries) * static_cast<double>(s.keys) * static_cast<double>(s.n * s.H * s.slots);
  }
  // All groups of `k` key-value heads, one after the other.
  void forward(const SdpaShape& s, double least) {
    try {
      const int64_t ws = sdpa.forward_workspace(s);
      const double t = seconds(least, [&] {
        for (int64_t g = 0; g < kK; g += s.k) sdpa.forward(s, ragged_ready(s, at(s.mask == Mask::kFull ? S - s.queries : 0, 0, g)), workspace, workspace_bytes);
      });
      row("attention forward", s, flops(s) * static_cast<double>(kK / s.k), t, ws);
    } catch (const std::exception& e) {
      fmt::print("{{\"what\": \"attention forward\", \"error\": \"{}\"}}\n", e.what());
    }
  }
  void backward(const SdpaShape& s, double least) {
    try {
      const int64_t ws = sdpa.backward_workspace(s);
      const double t = seconds(least, [&] {
        for (int64_t g = 0; g < kK; g += s.k) sdpa.backward(s, ragged_ready(s, at(s.mask == Mask::kFull ? S - s.queries : 0, 0, g)), workspace, workspace_bytes);
      });
      row("attention backward", s, 2.5 * flops(s) * static_cast<double>(kK / s.k), t, ws);
    } catch (const std::exception& e) {
      fmt::print("{{\"what\": \"attention backward\", \"error\": \"{}\"}}\n", e.what());
    }
  }
  // One document from row 0 on.
  SdpaPointers ragged_ready(const SdpaShape& s, SdpaPointers p) {
    if (!s.ragged) return p;
    static int64_t* offsets = nullptr;
    static int32_t* lengths = nullptr;
    static int64_t for_queries = -1;
    if (!offsets) offsets = static_cast<int64_t*>(device(64)), lengths = static_cast<int32_t*>(device(64));
    if (for_queries != s.queries) {
      const int64_t host[6] = {0, s.queries * row_elements, 0, s.queries * kN * H, 0, s.queries * kN};
      const int32_t length = static_cast<int32_t>(s.queries);
      must(cudaMemcpy(offsets, host, sizeof host, cudaMemcpyHostToDevice));
      must(cudaMemcpy(lengths, &length, 4, cudaMemcpyHostToDevice));
      for_queries = s.queries;
    }
    p.q_offsets = p.kv_offsets = offsets, p.o_offsets = offsets + 2, p.lse_offsets = offsets + 4, p.q_lengths = p.kv_lengths = lengths;
    return p;
  }
};

SdpaShape with_ragged(SdpaShape s) {
  s.ragged = true;
  return s;
}
SdpaShape with_fixed_order(SdpaShape s) {
  s.deterministic = true;
  return s;
}

void run_attention(double least, bool million) {
  Sdpa sdpa(stream);
  {
    Attention a(sdpa, 131072, int64_t{9} << 30);
    for (const int64_t S : {int64_t{16384}, int64_t{32768}, int64_t{65536}, int64_t{131072}})
      for (const int64_t k : {8, 2}) a.forward(a.shape(S, S, k, Mask::kCausal), least);
    a.forward(with_ragged(a.shape(65536, 65536, 8, Mask::kCausal)), least);
    for (const int64_t B : {int64_t{16384}, int64_t{32768}, int64_t{65536}})
      for (const int64_t k : {8, 2}) a.forward(a.shape(B, B, k, Mask::kFull), least);
    a.forward(a.shape(65536, 16384, 8, Mask::kFull), least);
    a.forward(a.shape(65536, 32768, 8, Mask::kFull), least);
    for (const int64_t S : {int64_t{8192}, int64_t{16384}, int64_t{32768}, int64_t{65536}, int64_t{131072}})
      for (const int64_t k : {8, 2, 1}) a.backward(a.shape(S, S, k, Mask::kCausal), least);
    a.backward(with_ragged(a.shape(32768, 32768, 8, Mask::kCausal)), least);
    a.backward(with_ragged(a.shape(65536, 65536, 8, Mask::kCausal)), least);
    for (const int64_t B : {int64_t{8192}, int64_t{16384}, int64_t{32768}, int64_t{65536}})
      for (const int64_t k : {8, 2}) a.backward(a.shape(B, B, k, Mask::kFull), least);
    a.backward(a.shape(16384, 65536, 8, Mask::kFull), least);
    a.backward(a.shape(65536, 16384, 8, Mask::kFull), least);
    for (const int64_t B : {int64_t{4096}, int64_t{8192}, int64_t{16384}}) {
      a.backward(with_fixed_order(a.shape(B, B, 2, Mask::kCausal)), least);
      a.backward(with_fixed_order(a.shape(B, B, 2, Mask::kFull)), least);
    }
  }
  for (const int64_t H : {64, 96, 256}) {
    Attention a(sdpa, 65536, int64_t{6} << 30, H);
    for (const int64_t S : {int64_t{4096}, int64_t{16384}, int64_t{65536}}) a.forward(a.shape(S, S, 8, Mask::kCausal), least), a.backward(a.shape(S, S, 8, Mask::kCausal), least);
  }
  if (!million) return;
  Attention a(sdpa, 1048576, int64_t{7} << 30);
  SdpaShape s = a.shape(1048576, 1048576, 1, Mask::kCausal);
  const int64_t ws = sdpa.backward_workspace(s);
  const double t = seconds(1, [&] { sdpa.backward(s, a.at(0, 0, 0), a.workspace, a.workspace_bytes); });
  a.row("attention backward", s, 2.5 * Attention::flops(s), t, ws);
}

void run_gemms(double least) {
  using kernels::Matrix;
  const auto matrix = [](void* p, int64_t rows, int64_t columns, Dtype dtype = Dtype::kBf16) { return Matrix{.data = p, .dtype = dtype, .rows = rows, .columns = columns, .stride = columns}; };
  const int64_t most = int64_t{16384} * 28672;
  void *a = random_bf16(most), *b = random_bf16(most), *c = random_bf16(most), *w = random_bf16(int64_t{128256} * 4096);
  void* dw = device(int64_t{128256} * 4096 * 4);
  struct Shape {
    const char* name;
    int64_t O, I;
  };
  for (const Shape s : {Shape{"qkv", 6144, 4096}, {"o", 4096, 4096}, {"gate_up", 28672, 4096}, {"down", 4096, 14336}, {"logits", 128256, 4096}}) {
    for (const int64_t t : {int64_t{8192}, int64_t{16384}}) {
      if (s.O > 100000 && t * s.O > most * 3) continue;
      if (t * s.O > most) continue;
      const Matrix x = matrix(a, t, s.I), y = matrix(b, t, s.O), weight = matrix(w, s.O, s.I), r = matrix(c, t, s.O), grad = matrix(dw, s.O, s.I, Dtype::kF32);
      const double flops = 2.0 * static_cast<double>(t) * static_cast<double>(s.O) * static_cast<double>(s.I);
      const auto all = [&](const char* what, const std::function<void(Gemm&)>& f) {
        for (const bool fixed : {true, false}) {
          void* workspace = device(ops::kGemmWorkspaceBytes);
          Gemm g(stream, workspace, fixed);
          fmt::print("{{\"what\": \"gemm {} {}\", \"tokens\": {}, \"timed_choice\": {}, \"tflops\": {:.0f}}}\n", s.name, what, t, !fixed, flops / seconds(least, [&] { f(g); }) / 1e12);
          cudaFree(workspace);
        }
        std::fflush(stdout);
      };
      all("forward", [&](Gemm& g) { g.linear(y, x, weight); });
      if (s.O <= 4096) all("forward + residual", [&](Gemm& g) { g.linear_add(y, x, weight, r); });
      all("dx", [&](Gemm& g) { g.linear_dx(x, y, weight); });
      all("dw", [&](Gemm& g) { g.linear_dw(grad, y, x, true); });
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const double least = argc > 1 ? std::atof(argv[1]) : 0.5;
  must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  run_attention(least, argc > 2);
  run_gemms(least / 4);
  return 0;
}
