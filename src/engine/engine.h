// The interpreter that runs a program: on the CPU, with ATen's GEMMs and attention, the kernels of kernels/cpu and
// collectives over Gloo. Buffers lie where the pricing run has placed them; a program that makes others than were priced
// is an internal error.
//
// Memory      the two arenas; besides, ATen's attention allocates its results, and bf16 GEMMs on the CPU work on fp32
//             copies of their tiles (docs/design.md, "What ATen allocates").
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

#include "comm/group.h"
#include "kernels/matrix.h"
#include "memory/arena.h"
#include "ops/ops.h"
#include "ops/places.h"

namespace uly::engine {

// What differs from micro-batch to micro-batch.
struct BatchData {
  std::vector<int64_t> ids, labels, positions;  // s each
  std::vector<int64_t> document_starts;         // of what attention sees: 0, ..., S
  double scale = 1.0;                           // of the loss and its gradient
  std::vector<float> inverse_frequencies;       // rope, H/2
  float rope_factor = 1.0f;                     // on cos and sin
  int64_t padding_token = -1;                   // its row of the embedding gets no gradient; -1: none
};

// What differs from update to update.
struct UpdateData {
  double learning_rate = 0, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0, clip = 1.0;
  int64_t step = 1;  // 1 at the first
};

class Engine final : public ops::Ops {
 public:
  // Groups outlive the engine.
  Engine(comm::Group& world, comm::Group& sequence) : world_(world), sequence_(sequence) {}

  // Gets the memory that lives as long as the run; then the program that makes it is run once.
  void begin_run(const ops::Places& places);
  // Starts a step program: its buffers are made in the order in which they were priced.
  void begin_step(const ops::Places& places, const BatchData& batch);
  // Gets the memory of step programs of up to so many bytes at once.
  void reserve_step(int64_t bytes);
  void set_update(const UpdateData& update) { update_ = update; }

  // The host's view of a buffer; valid until the next begin_step for buffers of a step.
  at::Tensor tensor(const ops::Buffer& b) const;
  double scalar(const ops::Buffer& b) const;  // of a 1 x 1 fp64 buffer

  // Most bytes alive at once within a step so far, and the end of the highest place that was used.
  int64_t peak_alive_bytes() const { return peak_alive_; }
  int64_t peak_placed_bytes() const { return peak_placed_; }
  const memory::Arena& step_arena() const { return step_arena_; }
  std::string where() const;  // "MLP backward, layer 17"

  ops::Buffer make(int64_t rows, int64_t columns, Dtype dtype, ops::Kind kind, std::string_view what, ops::Life life, ops::Tier tier) override;
  void release(const ops::Buffer& b) override;
  ops::Buffer input(ops::Input which) override;
  void zero(ops::Buffer y) override;
  void copy(ops::Buffer y, ops::Buffer x) override;
  void mark(std::string_view where, int64_t layer) override;
  void linear(ops::Buffer y, ops::Buffer x, ops::Buffer w) override;
  void linear_add(ops::Buffer y, ops::Buffer x, ops::Buffer w, ops::Buffer r) override;
  void linear_dx(ops::Buffer dx, ops::Buffer dy, ops::Buffer w) override;
  void linear_dw(ops::Buffer dw, ops::Buffer dy, ops::Buffer x) override;
  void add_bias(ops::Buffer y, ops::Buffer b) override;
  void bias_grad(ops::Buffer db, ops::Buffer dy) override;
  void rms_norm(ops::Buffer y, ops::Buffer rstd, ops::Buffer x, ops::Buffer w, double eps) override;
  void rms_norm_grad(ops::Buffer dx, ops::Buffer dw, ops::Buffer dy, ops::Buffer x, ops::Buffer rstd, ops::Buffer w) override;
  void head_norm(ops::Buffer y, ops::Buffer rstd, ops::Buffer x, ops::Buffer w, double eps) override;
  void head_norm_grad(ops::Buffer dx, ops::Buffer dw, ops::Buffer x, ops::Buffer rstd, ops::Buffer w) override;
  void rope_table(ops::Buffer table) override;
  void rope(ops::Buffer x, ops::Buffer table, int direction) override;
  void attention(ops::Buffer o, ops::Buffer lse, ops::Buffer qkv, const ops::Heads& heads) override;
  void attention_grad(ops::Buffer dqkv, ops::Buffer d_o, ops::Buffer qkv, ops::Buffer o, ops::Buffer lse, const ops::Heads& heads) override;
  void swiglu(ops::Buffer a, ops::Buffer gate_up) override;
  void swiglu_grad(ops::Buffer gate_up, ops::Buffer a, ops::Buffer da) override;
  void cross_entropy(ops::Buffer logits, ops::Buffer loss, ops::Buffer labels) override;
  void sum_loss(ops::Buffer total, ops::Buffer loss) override;
  void embed(ops::Buffer h, ops::Buffer table, ops::Buffer ids) override;
  void embed_grad(ops::Buffer dtable, ops::Buffer dh, ops::Buffer ids) override;
  void pack_columns(ops::Buffer send, ops::Buffer x, const ops::ColumnBlocks& blocks) override;
  void unpack_columns(ops::Buffer x, ops::Buffer received, const ops::ColumnBlocks& blocks) override;
  ops::Event all_to_all(ops::Buffer received, ops::Buffer send, ops::Group group, const std::vector<int64_t>& receive_elements, const std::vector<int64_t>& send_elements) override;
  ops::Event all_gather(ops::Buffer whole, ops::Buffer shard, ops::Group group) override;
  ops::Event scatter(ops::Buffer received, ops::Buffer whole, ops::Group group) override;
  void sum_pieces(ops::Buffer shard, ops::Buffer received, int64_t pieces) override;
  ops::Event all_reduce(ops::Buffer x, ops::Group group) override;
  void wait(ops::Event event) override;
  void squared_norm(ops::Buffer total, ops::Buffer x) override;
  void adamw(ops::Buffer weight, ops::Buffer master, ops::Buffer m, ops::Buffer v, ops::Buffer gradient, ops::Buffer total, const ops::UpdateRange& range) override;

 private:
  void* address(const ops::Buffer& b) const;
  kernels::Matrix matrix(const ops::Buffer& b) const;
  comm::Group& group(ops::Group which) { return which == ops::Group::kWorld ? world_ : sequence_; }
  ops::Event started(comm::Work work);

  comm::Group& world_;
  comm::Group& sequence_;
  memory::Arena run_arena_, step_arena_;
  ops::Places run_places_;
  const ops::Places* step_places_ = nullptr;  // the caller's, for the length of a step
  size_t made_run_ = 0, made_step_ = 0;
  ops::Buffer inputs_[3];
  BatchData batch_;
  UpdateData update_;
  std::vector<comm::Work> works_;
  int64_t alive_ = 0, peak_alive_ = 0, peak_placed_ = 0;
  std::string where_;
  int64_t layer_ = -1;
};

}  // namespace uly::engine
