// The engine on the CPU: ATen's GEMMs and attention, the kernels of kernels/cpu, collectives over Gloo.
//
// Memory      besides the arenas, ATen's attention allocates its results, and bf16 GEMMs work on fp32 copies of their tiles
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <exception>

#include "engine/disk_tier.h"
#include "engine/engine.h"
#include "engine/make.h"
#include "engine/worker.h"
#include "memory/arena.h"

namespace uly::engine {

class CpuEngine final : public Engine {
 public:
  // Groups outlive the engine.
  CpuEngine(comm::Group& world, comm::Group& sequence, const CpuOptions& options);
  ~CpuEngine() override;

  void read(void* host, const ops::Buffer& b) override;
  void write(const ops::Buffer& b, const void* host) override;
  void time(bool on) override { timed_ = on; }
  std::map<std::string, double> seconds() override;
  int64_t touched_step_bytes() const override { return step_arenas_[0].touched_bytes(); }
  std::array<int64_t, ops::kNumTiers> held_bytes() const override;
  std::vector<std::string> tier_words() const override;
  void finish() override;

  void zero(ops::Buffer y) override;
  void copy(ops::Buffer y, ops::Buffer x) override;
  ops::Event move(ops::Buffer y, ops::Buffer x) override;
  void linear(ops::Buffer y, ops::Buffer x, ops::Buffer w) override;
  void linear_add(ops::Buffer y, ops::Buffer x, ops::Buffer w, ops::Buffer r) override;
  void linear_dx(ops::Buffer dx, ops::Buffer dy, ops::Buffer w) override;
  void linear_dw(ops::Buffer dw, ops::Buffer dy, ops::Buffer x, bool add) override;
  void add_bias(ops::Buffer y, ops::Buffer b) override;
  void bias_grad(ops::Buffer db, ops::Buffer dy) override;
  void rms_norm(ops::Buffer y, ops::Buffer rstd, ops::Buffer x, ops::Buffer w, double eps) override;
  void rms_norm_grad(ops::Buffer dx, ops::Buffer dw, ops::Buffer dy, ops::Buffer x, ops::Buffer rstd, ops::Buffer w) override;
  void norm_rope(ops::Buffer x, ops::Buffer raw, ops::Buffer rstd, ops::Buffer w, ops::Buffer table, double eps) override;
  void norm_rope_grad(ops::Buffer dx, ops::Buffer dw, ops::Buffer raw, ops::Buffer rstd, ops::Buffer w, ops::Buffer table) override;
  void rope_table(ops::Buffer table) override;
  void rope(ops::Buffer x, ops::Buffer table, int direction) override;
  void attention(ops::Buffer o, ops::Buffer lse, ops::Buffer qkv, ops::Buffer workspace, const ops::Heads& heads, const ops::AttentionSchedule& schedule) override;
  void attention_grad(ops::Buffer dqkv, ops::Buffer d_o, ops::Buffer qkv, ops::Buffer o, ops::Buffer lse, ops::Buffer workspace, const ops::Heads& heads, const ops::AttentionSchedule& schedule) override;
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
  void squared_norm(ops::Buffer total, ops::Buffer x) override;
  ops::Event adamw(ops::Buffer weight, ops::Buffer master, ops::Buffer m, ops::Buffer v, ops::Buffer gradient, ops::Buffer norm, ops::Buffer loss, const ops::UpdateRange& range) override;

 private:
  std::byte* reserve(ops::Life life, ops::Tier tier, int64_t bytes) override;
  void load_batch(const ops::Buffer& table) override;
  at::Tensor tensor(const ops::Buffer& b) const;
  DiskTier& disk_of(const ops::Buffer& b) { return b.life == ops::Life::kRun ? run_disk_ : step_disk_; }

  // Done by a worker: asynchronous as on a GPU, so that what would go wrong there goes wrong here.
  enum class Aside : uint8_t { kToHost, kToDevice, kDisk, kHostUpdate, kExchange };
  ops::Event started_by(Worker& worker, Aside kind, std::function<void()> task);
  ops::Event exchange(comm::Work work);
  void timed(Aside kind, const std::function<void()>& task);
  // To be run by disk_: nothing once a task has failed, but what it threw.
  void with_disk(const std::function<void()>& task);

  std::array<memory::Arena, 2> run_arenas_, step_arenas_;  // of device and host tier
  memory::Arena ring_;
  DiskTier run_disk_, step_disk_;
  std::exception_ptr disk_failure_;  // of the worker's thread
  std::atomic<bool> timed_ = false;
  std::array<std::atomic<int64_t>, 5> nanoseconds_{};  // by Aside
  Worker to_host_, to_device_, disk_, host_;           // last: they end before what they use
};

}  // namespace uly::engine
