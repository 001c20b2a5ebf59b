// Scaled dot-product attention by cuDNN through cudnn-frontend: plans, built once for each shape, and their execution on
// given memory. Everything of cudnn-frontend is in sdpa.cc, which takes minutes to compile.
//
// Source      cuDNN 9.19, graph API, SDPA forward and backward
#pragma once

#include <cstdint>
#include <memory>

namespace uly::engine::cuda {

enum class Mask : uint8_t {
  kCausal,  // query i sees keys 0 .. i
  kFull,    // every query sees every key
};

// What a plan is built for. Rows are tokens; a row holds heads side by side, so strides count elements from one token to
// the next. Heads: n queries on k key-value heads, n % k == 0.
struct SdpaShape {
  int64_t slots = 1;             // documents at once
  int64_t queries = 0, keys = 0; // tokens of the longest document
  int64_t n = 0, k = 0, H = 0;
  int64_t q_stride = 0, kv_stride = 0, o_stride = 0;  // do is like o, dq like q, dk and dv like k and v unless given
  int64_t lse_stride = 0;        // ragged only; else the log-sum-exp is n x queries, head after head
  int64_t dkv_stride = 0, dq_stride = 0;  // 0: as kv_stride, q_stride
  Mask mask = Mask::kCausal;
  bool ragged = false;           // documents begin at given offsets and are shorter than the longest
  bool deterministic = false;    // of the backward: fixed order of sums, at a workspace of 2 n queries keys bytes
  bool operator<(const SdpaShape& o) const;
};

// Device memory. ragged: offsets are element offsets of each slot's first row, slots + 1 of them; lengths are tokens.
struct SdpaPointers {
  const void *q = nullptr, *k = nullptr, *v = nullptr;
  void* o = nullptr;
  float* lse = nullptr;
  const void* d_o = nullptr;
  void *dq = nullptr, *dk = nullptr, *dv = nullptr;
  const int64_t *q_offsets = nullptr, *kv_offsets = nullptr, *o_offsets = nullptr, *lse_offsets = nullptr;
  const int32_t *q_lengths = nullptr, *kv_lengths = nullptr;
};

class Sdpa {
 public:
  // `stream`: a cudaStream_t. Throws DeviceError where cuDNN cannot be had.
  explicit Sdpa(void* stream);
  ~Sdpa();
  Sdpa(const Sdpa&) = delete;
  Sdpa& operator=(const Sdpa&) = delete;

  // Bytes of workspace; builds the plan if there is none yet. Throws InternalError with cuDNN's words where it has none.
  int64_t forward_workspace(const SdpaShape& shape);
  int64_t backward_workspace(const SdpaShape& shape);

  // Asynchronous. `workspace_bytes` are what the caller has: less than the plan needs is an InternalError.
  void forward(const SdpaShape& shape, const SdpaPointers& p, void* workspace, int64_t workspace_bytes);
  void backward(const SdpaShape& shape, const SdpaPointers& p, void* workspace, int64_t workspace_bytes);

 private:
  struct Inside;
  std::unique_ptr<Inside> inside_;
};

}  // namespace uly::engine::cuda
