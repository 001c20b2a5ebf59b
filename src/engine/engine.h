// The interpreter that runs a program. Buffers lie where the pricing run has placed them; a program that makes others than
// were priced is an internal error. What every kind of engine shares is here; CpuEngine and CudaEngine carry the
// instructions out.
//
// Memory      in each tier two arenas, of what lives as long as the run and of one step; what besides is in docs/design.md
// Threads     the launching thread, which on a GPU never waits between begin_step and finish, except for exchanges between
//             ranks that go through host memory (not by NCCL); one for moves to and from the disk, one for updates on the host
// Rehearsal   All runs whole but linear maps and attention: of the former the first kRehearsedRows tokens are computed, once where
//             they go tile by tile, of the latter a first document of at most kRehearsedDocument; the rest of what they write is zero.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "comm/group.h"
#include "kernels/exchange.h"
#include "kernels/matrix.h"
#include "kernels/optimizer.h"
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

class Engine : public ops::Ops {
 public:
  static constexpr int64_t kRehearsedRows = 64, kRehearsedDocument = 256;

  // `node`: null where no ranks share a second copy of the weights.
  Engine(comm::Group& world, comm::Group& sequence, comm::Group* node, bool rehearsal = false) : groups_{&sequence, &world, node}, rehearsal_(rehearsal) {}

  // Gets the memory that lives as long as the run; then the program that makes it is run once.
  void begin_run(const ops::Places& places);
  // Starts a step program: its buffers are made in the order in which they were priced.
  void begin_step(const ops::Places& places, BatchData batch, int64_t document_table_bytes);
  // Gets the memory of step programs of up to so many bytes at once.
  void reserve_step(const ops::Places& largest);
  void set_update(const UpdateData& update) { update_ = update; }

  // Time by kind of work since the last call, after finish(); nothing unless asked for by time(true). On the CPU of what is done
  // beside the launching thread only: to_host, to_device, disk, host_update; exchange is what that thread waited for.
  virtual void time(bool) {}
  virtual std::map<std::string, double> seconds() { return {}; }
  // Returns when all that was started has been done: what failed on the way is thrown here at the latest.
  virtual void finish() {}
  // Copies to and from a contiguous buffer; waits for what was started before.
  virtual void read(void* host, const ops::Buffer& b) = 0;
  virtual void write(const ops::Buffer& b, const void* host) = 0;
  double scalar(const ops::Buffer& b);  // of a 1 x 1 fp64 buffer

  // Most bytes alive at once within a step so far, and the end of the highest place that was used.
  int64_t peak_alive_bytes() const { return peak_alive_; }
  int64_t peak_placed_bytes() const { return peak_placed_; }
  // Bytes of the step's arena that were touched, as far as it is known.
  virtual int64_t touched_step_bytes() const { return peak_placed_; }
  // Bytes of each tier that the system has given to the arenas; where it does not say, what was asked for.
  virtual std::array<int64_t, ops::kNumTiers> held_bytes() const;
  // How the tiers beyond the device turned out: "disk, between steps: 40.0 GiB in /scratch, O_DIRECT, io_uring".
  virtual std::vector<std::string> tier_words() const { return {}; }
  std::string where() const;  // "MLP backward, layer 17"

  ops::Buffer make(int64_t rows, int64_t columns, Dtype dtype, ops::Kind kind, std::string_view what, ops::Life life, ops::Tier tier) override;
  void release(const ops::Buffer& b) override;
  ops::Buffer input(ops::Input which) override { return inputs_[static_cast<size_t>(which)]; }
  void mark(std::string_view where, int64_t layer) override;
  void wait(ops::Event event) override;

 protected:
  // Returns an arena of so many bytes in place of the one there was; of the disk null.
  virtual std::byte* reserve(ops::Life life, ops::Tier tier, int64_t bytes) = 0;
  // Fills the inputs; `table` has the bytes that begin_step was given.
  virtual void load_batch(const ops::Buffer& table) = 0;

  void* address(const ops::Buffer& b) const;  // not of the disk
  int64_t place_bytes(const ops::Buffer& b) const;  // from the start of its arena
  kernels::Matrix matrix(const ops::Buffer& b) const;
  comm::Group& group(ops::Group which) { return *groups_[static_cast<size_t>(which)]; }
  bool has(ops::Group which) const { return groups_[static_cast<size_t>(which)] != nullptr; }
  // An event that has happened when `wait` returns.
  ops::Event started(std::function<void()> wait);
  const BatchData& batch() const { return batch_; }
  // Where the documents start that attention computes, of S tokens in all.
  std::vector<int64_t> documents(int64_t S) const;
  // Cuts what has a row a token to the rows that are computed of a linear map, and empties those of its result that are not. False
  // where there are none. `matrix`: the weight, or its gradient, by which tiles know each other.
  enum class Map : uint8_t { kLinear, kLinearAdd, kDx, kDw };
  bool cut(Map map, const ops::Buffer& matrix, std::initializer_list<ops::Buffer*> operands, ops::Buffer* result = nullptr);
  void zero_from(const ops::Buffer& b, int64_t row);
  kernels::AdamwArgs adamw_args(const ops::Buffer& weight, const ops::Buffer& master, const ops::Buffer& m, const ops::Buffer& v, const ops::Buffer& gradient, const ops::Buffer& norm, const ops::Buffer& loss,
                                const ops::UpdateRange& range) const;

 private:
  std::array<comm::Group*, ops::kNumGroups> groups_;
  std::array<std::byte*, ops::kNumTiers> run_base_{}, step_base_{};
  std::array<int64_t, ops::kNumTiers> step_bytes_{};
  ops::Places run_places_;
  const ops::Places* step_places_ = nullptr;  // the caller's, for the length of a step
  size_t made_run_ = 0, made_step_ = 0;
  ops::Buffer inputs_[ops::kNumInputs];
  BatchData batch_;
  UpdateData update_;
  std::vector<std::function<void()>> waits_;
  int64_t alive_ = 0, peak_alive_ = 0, peak_placed_ = 0;
  std::string where_;
  int64_t layer_ = -1;
  bool rehearsal_;
  std::set<std::tuple<Map, ops::Life, int32_t, int64_t>> rehearsed_;  // linear maps since the last mark
};

// The column ranges of every rank's block in a packed buffer of `rows` rows a block.
std::vector<kernels::PackedColumns> packed_columns(const ops::ColumnBlocks& blocks, int64_t rows);

// Bytes of so many elements each.
std::vector<int64_t> in_bytes(std::vector<int64_t> elements, Dtype dtype);

}  // namespace uly::engine
