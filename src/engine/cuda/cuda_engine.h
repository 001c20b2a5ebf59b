// The engine on an NVIDIA GPU: GEMMs by cuBLASLt, attention by cuDNN (or ATen's flash attention), everything else by
// kernels/*.cu, all on one stream; copies to and from host and disk on three others, exchanges by NCCL on one a group. Built into libulysses_cuda.so, which is
// loaded where a GPU is asked for (engine/make.h).
//
// Memory      the arenas, by cudaMalloc, on the host registered with CUDA; besides kGemmWorkspaceBytes and scratch for kernels,
//             and what CUDA, cuBLAS and cuDNN load for themselves; where a disk is used, a pinned ring (disk_moves.h)
// Threads     the launching one; one for the disk and one for updates on the host, which call nothing of CUDA (flags.h)
#pragma once

#include <array>
#include <deque>
#include <functional>
#include <optional>
#include <vector>

#include "engine/cuda/attention.h"
#include "engine/cuda/disk_moves.h"
#include "engine/cuda/gemm.h"
#include "engine/cuda/memory.h"
#include "engine/cuda/nccl.h"
#include "engine/cuda/range.h"
#include "engine/cuda/tasks.h"
#include "engine/engine.h"
#include "engine/make.h"
#include "memory/host_arena.h"

namespace uly::engine::cuda {

class CudaEngine final : public Engine {
 public:
  CudaEngine(comm::Group& world, comm::Group& sequence, const CudaOptions& options);
  ~CudaEngine() override;

  void finish() override;
  void read(void* host, const ops::Buffer& b) override;
  void write(const ops::Buffer& b, const void* host) override;
  void mark(std::string_view where, int64_t layer) override;
  void time(bool on) override;
  std::map<std::string, double> seconds() override;
  std::array<int64_t, ops::kNumTiers> held_bytes() const override;
  std::vector<std::string> tier_words() const override;

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
  void wait(ops::Event event) override;

 private:
  // What an event stands for.
  struct Pending {
    cudaEvent_t event = nullptr;  // what a stream beside has done
    Tasks* tasks = nullptr;       // or a task
    uint32_t number = 0;
    int64_t exchange = -1;        // or an exchange
  };
  // The host's arena. Without room for locked memory it is pageable: what CUDA copies of that it may read before its turn, so the
  // launching thread waits for the turn.
  struct HostMemory {
    memory::HostArena arena;
    bool locked = false;
  };

  std::byte* reserve(ops::Life life, ops::Tier tier, int64_t bytes) override;
  std::byte* reserve_device(ops::Life life, int64_t bytes);
  std::byte* reserve_host(ops::Life life, int64_t bytes);
  void release_host(HostMemory& host);
  HostMemory& host_of(ops::Life life) { return life == ops::Life::kRun ? run_host_ : step_host_; }
  void load_batch(const ops::Buffer& table) override;
  [[noreturn]] void out_of_memory(int64_t bytes);

  // Memory for sums over rows, given out anew to each kernel: they run one after the other.
  void* scratch(int64_t bytes);
  // Copies to the device without waiting.
  void send(void* to, const void* from, int64_t bytes);
  AttentionArgs attention_args(const std::vector<int64_t>& starts, ops::Buffer o, ops::Buffer lse, ops::Buffer qkv, ops::Buffer workspace, const ops::Heads& heads, const ops::AttentionSchedule& schedule);
  // At least so many bytes of the host, of few different sizes, so that they serve again.
  Memory pinned(int64_t bytes);
  ops::Event pending(Pending p);
  // An event for this program; those of earlier ones serve again: who waits for one has been told to already.
  cudaEvent_t next_event();
  // `stream` goes on when all is done that is queued now; and the event that what it has got since is done.
  void begin_beside(cudaStream_t stream);
  ops::Event end_beside(cudaStream_t stream);
  DiskMoves::At on_disk(const ops::Buffer& b) const { return {.life = b.life, .place = place_bytes(b)}; }
  // Throws what has failed beside.
  void rethrow();
  // By NCCL, in place; null where ranks exchange through host memory.
  Nccl* nccl(ops::Group which) { return nccl_[static_cast<size_t>(which)] ? &*nccl_[static_cast<size_t>(which)] : nullptr; }
  ops::Event exchange_by(Nccl& nccl, const char* name, const std::function<void()>& start);
  // An exchange through host memory: waits for what `from` is computed by, starts; wait() brings the result to `to`.
  ops::Event exchange(const ops::Buffer& to, const ops::Buffer& from, const std::function<comm::Work(void* to, void* from)>& start);
  Range range(Work work, const char* name) { return Range(timers_, work, name, stream_); }

  CudaOptions options_;
  kernels::Stream stream_ = nullptr;
  cudaStream_t to_host_ = nullptr, to_device_ = nullptr, disk_stream_ = nullptr;
  std::vector<cudaEvent_t> events_;
  size_t events_used_ = 0;
  Memory run_, step_, gemm_workspace_, scratch_;
  HostMemory run_host_, step_host_;
  std::array<std::optional<Nccl>, ops::kNumGroups> nccl_;  // by group
  std::optional<DiskMoves> disk_;
  std::optional<Tasks> host_;  // updates
  std::optional<Gemm> gemm_;
  std::optional<Attention> attention_;
  std::deque<Memory> staged_;  // pinned; what lies in them is on its way until finish()
  size_t staged_used_ = 0;
  ops::Buffer table_;
  int64_t table_used_ = 0;
  bool planned_ = false;       // attention's calls for this batch
  const float* inverse_frequencies_ = nullptr;
  struct Exchange {
    Memory from, to;
    ops::Buffer into;
    comm::Work work;
  };
  std::vector<Exchange> exchanges_;
  std::vector<Pending> pending_;  // by event
  std::vector<Memory> pinned_;  // of exchanges that are done: pinning takes longer than many an exchange
  Timers timers_;
  std::optional<Named> where_;
};

}  // namespace uly::engine::cuda
