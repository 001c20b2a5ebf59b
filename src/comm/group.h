// Collectives between the ranks of a group. Data moves as bytes, so every dtype passes; sums are taken here, in order of
// rank, so that they are the same bits on every rank and in every run.
//
// A collective is started by the call and done when its Work has been waited for. Several may be in flight. All ranks
// start them in the same order, and wait for all_reduce_sum in the same order. One thread at a time uses a group. A
// group of one rank copies and needs no transport.
//
// Throws      DeviceError naming this rank, the operation, the group and the peer: one is gone, or did not answer within
//             the time-out. The group is of no use afterwards.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace uly::comm {

class Mesh;

// A collective on its way; the default one is done. Its buffers must stay until wait() has returned. Destroying it
// without waiting gives it up.
class Work {
 public:
  struct State;
  Work();
  explicit Work(std::unique_ptr<State> state);
  Work(Work&&) noexcept;
  Work& operator=(Work&&) noexcept;
  ~Work();

  // Returns when all has been received and sent; a second call does nothing.
  void wait();
  bool done() const { return !state_; }

 private:
  std::unique_ptr<State> state_;
};

// Who takes part; ranks are counted in the world.
struct Members {
  std::string name;            // for people: "sequence"
  std::vector<int64_t> ranks;  // in order
  int64_t mine = 0;            // index into ranks
};

// The largest piece that is handed to the transport at once; larger messages go in several.
inline constexpr int64_t kPieceBytes = int64_t{1} << 30;

class Group {
 public:
  // `mesh` connects the members; null for one rank. World makes groups.
  Group(Members members, std::unique_ptr<Mesh> mesh, int64_t piece_bytes = kPieceBytes);
  ~Group();
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  int64_t rank() const;
  int64_t size() const;
  const Members& members() const;

  // Sends send_bytes[p] bytes to each rank p and receives receive_bytes[p] from it; blocks lie one after the other, in
  // order of rank. Counts may be 0 and must agree between sender and receiver.
  Work all_to_all(void* receive, const void* send, const std::vector<int64_t>& receive_bytes, const std::vector<int64_t>& send_bytes);

  // whole = every rank's shard of `bytes` bytes, in order of rank. shard may be this rank's place in whole.
  Work all_gather(void* whole, const void* shard, int64_t bytes);

  // Replaces x by its sum over the ranks, in order of rank; adds in x's type.
  //
  // Memory      scratch of about count elements (size() * count up to 64 KiB), until the wait
  Work all_reduce_sum(float* x, int64_t count);
  Work all_reduce_sum(double* x, int64_t count);

  // Copies `bytes` bytes of rank `root` (within the group) to all others.
  Work broadcast(void* x, int64_t bytes, int64_t root = 0);

  // Returns when every rank has come here.
  void barrier();

  // Returns what each rank gave, in order of rank.
  std::vector<std::string> exchange(const std::string& mine);

  // Element-wise over the ranks; all ranks give equally many.
  std::vector<int64_t> sum(const std::vector<int64_t>& mine);
  std::vector<int64_t> max(const std::vector<int64_t>& mine);
  int64_t sum(int64_t mine) { return sum(std::vector<int64_t>{mine})[0]; }
  int64_t max(int64_t mine) { return max(std::vector<int64_t>{mine})[0]; }

  struct State;

 private:
  std::vector<int64_t> gather(const std::vector<int64_t>& mine);

  std::shared_ptr<State> state_;
};

}  // namespace uly::comm
