// The ranks of a job: how they find each other, and the groups among them.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "comm/group.h"

namespace uly::comm {

class Heartbeat;
class Store;

// Where and as whom to join.
struct Rendezvous {
  int64_t rank = 0, size = 1;
  std::string address = "127.0.0.1";  // where rank 0 serves the store
  int port = 29500;
  bool one_machine = true;        // all ranks are here: nothing listens beyond the loopback interface
  bool served_elsewhere = false;  // a launcher keeps the store: no rank serves it
  std::string prefix;             // of this job's keys in the store
  bool together = false;          // one launcher has started all ranks at the same time: who does not come soon is missed
  bool by_ulysses = false;        // ulysses has started this rank, and chosen the port
  std::function<bool()> interrupted;  // polled until all have come: whether to give up

  // How long a collective, or joining, waits for a peer. Ranks wait here while the first prepares, so not less than
  // the slowest rank may lag behind.
  std::chrono::milliseconds timeout = std::chrono::minutes(10);
  int64_t piece_bytes = kPieceBytes;
  std::chrono::seconds silence{20};  // after which a rank that gives no sign of life ends this one; 0: never
};

// Reads RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and what torchrun adds. Without RANK and
// WORLD_SIZE: one rank. ULYSSES_JOB_TOKEN: a word that only this job knows. ULYSSES_STARTED, from ulysses: "together" or, where the
// same command is started on each machine, "apart".
// ULYSSES_SILENCE: `silence`. Throws UserError naming the variable that is no number or out of range.
Rendezvous rendezvous_from_environment();

// This machine, by the name by which the launcher knows it, or else its own.
std::string machine_name();

// One rank's membership. Groups may outlive it; on rank 0 it holds the store's server, so it stays as long as groups are
// being made anywhere.
class World {
 public:
  // Returns when all ranks have come. Throws DeviceError if they do not come in time, UserError if the port is taken, and an Error with
  // Exit::kPreempted on each rank that has come, or comes within seconds, if any of them is interrupted before that. From its beginning, and as long as it
  // lives, a rank that gives no sign of life any more ends this process: a DeviceError that names it leaves a thread.
  static World join(const Rendezvous& rendezvous);

  // For tests: `size` worlds for as many threads of this process.
  static std::vector<World> threads(int64_t size, std::chrono::milliseconds timeout = std::chrono::minutes(10), int64_t piece_bytes = kPieceBytes);

  World(World&&) noexcept;
  World& operator=(World&&) noexcept;
  ~World();

  int64_t rank() const { return rendezvous_.rank; }
  int64_t size() const { return rendezvous_.size; }
  Group& all() { return *all_; }

  // Makes the group of these ranks; called by each of them, with the same list and a name that was not used before
  // among them. This rank is one of them.
  std::unique_ptr<Group> subgroup(const std::vector<int64_t>& ranks, const std::string& name);

 private:
  World(Rendezvous rendezvous, std::shared_ptr<Store> store);

  Rendezvous rendezvous_;
  std::shared_ptr<Store> store_;  // null for one rank
  std::unique_ptr<Group> all_;
  std::unique_ptr<Heartbeat> heartbeat_;  // null for one rank, and where ranks are threads
};

}  // namespace uly::comm
