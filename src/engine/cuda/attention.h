// Causal attention within documents on a GPU: which calls of cuDNN a layout of documents becomes.
//
// A long document stands alone: forward in causal blocks of schedule.forward_block tokens, merged by log-sum-exp, which
// keeps keys and values in the L2 cache; backward in one call, or in blocks of queries x keys where workspace, order or
// speed ask for it. Short documents of about the same length share calls: slots x longest, unused slots are empty, so
// thousands of them cost no empty work. Head groups (schedule.kv_heads_at_once) bound the workspace.
//
// The log-sum-exp of a document that begins at row r lies from element r * n on: heads x tokens for one that stands alone,
// tokens x heads for those that share calls.
//
// Source      online softmax: arXiv:1805.02867; merging by log-sum-exp: arXiv:2205.14135, section 3
#pragma once

#include <optional>
#include <vector>

#include "engine/cuda/sdpa.h"
#include "kernels/matrix.h"
#include "ops/attention.h"

namespace uly::engine::cuda {

// Matrices of all of this rank's heads; q, k, v and their gradients are columns of one matrix.
struct AttentionArgs {
  kernels::Matrix qkv, o, lse;       // S x (n + 2k)H | S x nH | S x n, fp32, layout as above
  kernels::Matrix dqkv, d_o;         // backward only
  kernels::Matrix workspace;
  ops::Heads heads;
  ops::AttentionSchedule schedule;
};

class Attention {
 public:
  explicit Attention(kernels::Stream stream) : stream_(stream), sdpa_(stream) {}

  // Cuts the documents [starts[i], starts[i+1]) into calls. Returns what must lie at `table` on the device before the first
  // call: the caller copies it there. At most ops::document_table_bytes.
  std::vector<std::byte> plan(const std::vector<int64_t>& starts, const AttentionArgs& shapes, std::byte* table);

  // Asynchronous.
  void forward(const AttentionArgs& a);
  void backward(const AttentionArgs& a);

 private:
  // One document that stands alone, or several that share a call.
  struct Call {
    int64_t slots = 1, longest = 0;
    int64_t first_row = 0;  // of one alone
    bool alone = false;
    const int64_t *qkv_offsets = nullptr, *o_offsets = nullptr, *lse_offsets = nullptr;  // on the device
    const int32_t* lengths = nullptr;
  };
  struct View;  // pointers of one head span
  class Workspace;

  template <typename Alone, typename Shared>
  void for_calls(const AttentionArgs& a, Alone&& alone, Shared&& shared);
  void forward_alone(const AttentionArgs& a, const View& v, const Call& c);
  void backward_alone(const AttentionArgs& a, const View& v, const Call& c);
  void backward_blocks(const AttentionArgs& a, const View& v, const Call& c);

  kernels::Stream stream_;
  Sdpa sdpa_;
  std::vector<Call> calls_;
};

}  // namespace uly::engine::cuda
