#include "engine/cuda/gemm.h"

#include <cublasLt.h>
#include <cuda_runtime.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <map>
#include <vector>

#include "base/check.h"

namespace uly::engine::cuda {
namespace {

void good(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  const std::string words = fmt::format("cuBLASLt: {}: {}", what, cublasLtGetStatusString(status));
  if (status == CUBLAS_STATUS_EXECUTION_FAILED || status == CUBLAS_STATUS_ALLOC_FAILED || status == CUBLAS_STATUS_NOT_INITIALIZED) throw DeviceError(words);
  throw InternalError(words);
}

// Handles that cuBLASLt gives out by address.
template <typename T, auto kDestroy>
class Owned {
 public:
  Owned() = default;
  Owned(Owned&& o) noexcept : h_(o.h_) { o.h_ = nullptr; }
  Owned& operator=(Owned&& o) noexcept {
    std::swap(h_, o.h_);
    return *this;
  }
  ~Owned() {
    if (h_) kDestroy(h_);
  }
  T* out() { return &h_; }
  operator T() const { return h_; }

 private:
  T h_ = nullptr;
};
using Operation = Owned<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy>;
using Layout = Owned<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>;
using Preference = Owned<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy>;

Layout layout(cudaDataType_t type, int64_t rows, int64_t columns, int64_t leading) {
  Layout l;
  good(cublasLtMatrixLayoutCreate(l.out(), type, static_cast<uint64_t>(rows), static_cast<uint64_t>(columns), leading), "layout");
  return l;
}

struct Plan {
  Operation operation;
  Layout a, b, c, d;
  cublasLtMatmulAlgo_t algorithm;
};

}  // namespace

// D = op(A) op(B) + beta C, all column-major: m x n, summed over k.
struct Gemm::Product {
  cublasOperation_t op_a, op_b;
  int64_t m, n, k;
  const void *a, *b, *c;
  void* d;
  int64_t lda, ldb, ldc, ldd;
  cudaDataType_t out;
  float beta;
};

struct Gemm::Inside {
  kernels::Stream stream;
  void* workspace;
  bool fixed_choice = false;
  cublasLtHandle_t handle = nullptr;
  using Key = std::array<int64_t, 12>;
  std::map<Key, Plan> plans;
  std::map<Key, cublasLtMatmulAlgo_t> fastest_of;  // by shapes of about as many tokens

  static Key key(const Product& p) {
    return {p.op_a,  p.op_b, p.m, p.n, p.k, p.lda, p.ldb, p.ldc, p.ldd, p.out * 2 + (p.beta != 0), alignment(p.a) * 512 + alignment(p.b), alignment(p.c) * 512 + alignment(p.d)};
  }
  // Tokens are the columns of all results but the weights' gradients, which sum over them.
  static Key key_of_about(Product p) {
    int64_t& tokens = p.out == CUDA_R_32F ? p.k : p.n;
    int64_t power = 1;
    while (power * 2 <= tokens) power *= 2;
    tokens = power;
    return key(p);
  }

  // How far an address is aligned, as far as algorithms care.
  static int64_t alignment(const void* p) {
    const auto a = reinterpret_cast<uintptr_t>(p);
    return a % 256 == 0 ? 256 : static_cast<int64_t>(a & (~a + 1));
  }

  void multiply(const Plan& plan, const Product& p, const cublasLtMatmulAlgo_t& algorithm, float alpha) const {
    good(cublasLtMatmul(handle, plan.operation, &alpha, p.a, plan.a, p.b, plan.b, &p.beta, p.c, plan.c, p.d, plan.d, &algorithm, workspace, static_cast<size_t>(ops::kGemmWorkspaceBytes), stream), "matrix product");
  }

  Plan make(const Product& p) {
    Plan plan;
    const auto set = [&](cublasLtMatmulDescAttributes_t name, const auto& value) { good(cublasLtMatmulDescSetAttribute(plan.operation, name, &value, sizeof value), "operation"); };
    good(cublasLtMatmulDescCreate(plan.operation.out(), CUBLAS_COMPUTE_32F, CUDA_R_32F), "operation");
    set(CUBLASLT_MATMUL_DESC_TRANSA, p.op_a);
    set(CUBLASLT_MATMUL_DESC_TRANSB, p.op_b);
    plan.a = p.op_a == CUBLAS_OP_N ? layout(CUDA_R_16BF, p.m, p.k, p.lda) : layout(CUDA_R_16BF, p.k, p.m, p.lda);
    plan.b = p.op_b == CUBLAS_OP_N ? layout(CUDA_R_16BF, p.k, p.n, p.ldb) : layout(CUDA_R_16BF, p.n, p.k, p.ldb);
    plan.c = layout(p.out, p.m, p.n, p.ldc);
    plan.d = layout(p.out, p.m, p.n, p.ldd);
    plan.algorithm = choose(plan, p);
    return plan;
  }

  cublasLtMatmulAlgo_t choose(const Plan& plan, const Product& p) {
    const auto known = fastest_of.find(key_of_about(p));
    cublasLtMatmulHeuristicResult_t checked;
    if (known != fastest_of.end() && cublasLtMatmulAlgoCheck(handle, plan.operation, plan.a, plan.b, plan.c, plan.d, &known->second, &checked) == CUBLAS_STATUS_SUCCESS &&
        checked.workspaceSize <= static_cast<size_t>(ops::kGemmWorkspaceBytes))
      return known->second;
    const std::vector<cublasLtMatmulAlgo_t> candidates = propose(plan, p);
    const double flops = 2.0 * static_cast<double>(p.m) * static_cast<double>(p.n) * static_cast<double>(p.k);
    // With the same bits in every run, or where time is no matter: the first. A neighbour's that does not fit: the first too.
    if (fixed_choice || known != fastest_of.end() || candidates.size() == 1 || flops < 1e11) return candidates[0];
    return fastest_of.emplace(key_of_about(p), candidates[fastest(plan, p, candidates)]).first->second;
  }

  std::vector<cublasLtMatmulAlgo_t> propose(const Plan& plan, const Product& p) const {
    constexpr int kMost = 8;
    Preference preference;
    good(cublasLtMatmulPreferenceCreate(preference.out()), "preference");
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t name, const auto& value) { good(cublasLtMatmulPreferenceSetAttribute(preference, name, &value, sizeof value), "preference"); };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(ops::kGemmWorkspaceBytes));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, static_cast<uint32_t>(alignment(p.a)));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, static_cast<uint32_t>(alignment(p.b)));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, static_cast<uint32_t>(alignment(p.c)));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, static_cast<uint32_t>(alignment(p.d)));
    std::array<cublasLtMatmulHeuristicResult_t, kMost> found;
    int count = 0;
    good(cublasLtMatmulAlgoGetHeuristic(handle, plan.operation, plan.a, plan.b, plan.c, plan.d, preference, kMost, found.data(), &count), "no algorithm for this product");
    std::vector<cublasLtMatmulAlgo_t> algorithms;
    for (int i = 0; i < count; ++i)
      if (found[static_cast<size_t>(i)].state == CUBLAS_STATUS_SUCCESS) algorithms.push_back(found[static_cast<size_t>(i)].algo);
    ULY_CHECK(!algorithms.empty(), "cuBLASLt has an algorithm");
    return algorithms;
  }

  // Milliseconds of `repeats` products in a row. A result that is written is computed again afterwards; one that is added to
  // gets the product times 1e-38 here, which changes no number that a step could tell apart.
  float time(const Plan& plan, const Product& p, const cublasLtMatmulAlgo_t& algorithm, int repeats) const {
    cudaEvent_t begin = nullptr, end = nullptr;
    cudaEventCreate(&begin);
    cudaEventCreate(&end);
    cudaEventRecord(begin, stream);
    for (int i = 0; i < repeats; ++i) multiply(plan, p, algorithm, p.beta == 0 ? 1.0f : 1e-38f);
    cudaEventRecord(end, stream);
    cudaEventSynchronize(end);
    float ms = 0;
    cudaEventElapsedTime(&ms, begin, end);
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    return ms;
  }

  // Index of the fastest. Each is run once for its code to be loaded and once for a first order; of large products the first
  // four are then run for a while each, in turn: what counts is the speed at the power limit, where clocks depend on the
  // algorithm, and a burst says little of it.
  size_t fastest(const Plan& plan, const Product& p, const std::vector<cublasLtMatmulAlgo_t>& candidates) const {
    constexpr double kLarge = 1e12;  // FLOP
    constexpr float kWhile = 40.0f;  // ms
    constexpr size_t kFinalists = 4;
    std::vector<std::pair<float, size_t>> order;
    for (size_t i = 0; i < candidates.size(); ++i) {
      time(plan, p, candidates[i], 1);
      order.emplace_back(time(plan, p, candidates[i], 1), i);
    }
    std::sort(order.begin(), order.end());
    if (2.0 * static_cast<double>(p.m) * static_cast<double>(p.n) * static_cast<double>(p.k) < kLarge) return order[0].second;
    order.resize(std::min(order.size(), kFinalists));
    const int repeats = std::clamp(static_cast<int>(kWhile / order[0].first), 1, 64);
    for (auto& [ms, i] : order) ms = 0;
    for (int round = 0; round < 2; ++round)
      for (auto& [ms, i] : order) ms += time(plan, p, candidates[i], repeats);
    return std::min_element(order.begin(), order.end())->second;
  }
};

Gemm::Gemm(kernels::Stream stream, void* workspace, bool fixed_choice) : inside_(std::make_unique<Inside>()) {
  inside_->stream = stream;
  inside_->workspace = workspace;
  inside_->fixed_choice = fixed_choice;
  good(cublasLtCreate(&inside_->handle), "start");
}

Gemm::~Gemm() {
  inside_->plans.clear();
  if (inside_->handle) cublasLtDestroy(inside_->handle);
}

void Gemm::run(const Product& p) {
  if (p.m == 0 || p.n == 0 || p.k == 0) return;
  const Inside::Key key = Inside::key(p);
  auto plan = inside_->plans.find(key);
  if (plan == inside_->plans.end()) plan = inside_->plans.emplace(key, inside_->make(p)).first;
  inside_->multiply(plan->second, p, plan->second.algorithm, 1.0f);
}

// A row-major matrix is the column-major transpose: y' = w x'.
void Gemm::linear(const Matrix& y, const Matrix& x, const Matrix& w) {
  run({.op_a = CUBLAS_OP_T, .op_b = CUBLAS_OP_N, .m = y.columns, .n = y.rows, .k = x.columns, .a = w.data, .b = x.data, .c = y.data, .d = y.data, .lda = w.stride, .ldb = x.stride, .ldc = y.stride, .ldd = y.stride, .out = CUDA_R_16BF, .beta = 0});
}

void Gemm::linear_add(const Matrix& y, const Matrix& x, const Matrix& w, const Matrix& r) {
  run({.op_a = CUBLAS_OP_T, .op_b = CUBLAS_OP_N, .m = y.columns, .n = y.rows, .k = x.columns, .a = w.data, .b = x.data, .c = r.data, .d = y.data, .lda = w.stride, .ldb = x.stride, .ldc = r.stride, .ldd = y.stride, .out = CUDA_R_16BF, .beta = 1});
}

void Gemm::linear_dx(const Matrix& dx, const Matrix& dy, const Matrix& w) {
  run({.op_a = CUBLAS_OP_N, .op_b = CUBLAS_OP_N, .m = dx.columns, .n = dx.rows, .k = dy.columns, .a = w.data, .b = dy.data, .c = dx.data, .d = dx.data, .lda = w.stride, .ldb = dy.stride, .ldc = dx.stride, .ldd = dx.stride, .out = CUDA_R_16BF, .beta = 0});
}

void Gemm::linear_dw(const Matrix& dw, const Matrix& dy, const Matrix& x, bool add) {
  run({.op_a = CUBLAS_OP_N, .op_b = CUBLAS_OP_T, .m = dw.columns, .n = dw.rows, .k = x.rows, .a = x.data, .b = dy.data, .c = dw.data, .d = dw.data, .lda = x.stride, .ldb = dy.stride, .ldc = dw.stride, .ldd = dw.stride, .out = CUDA_R_32F, .beta = add ? 1.0f : 0.0f});
}

}  // namespace uly::engine::cuda
