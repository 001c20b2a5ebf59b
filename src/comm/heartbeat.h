// Signs of life in the store: a rank that has stopped, or that cannot be reached, is found although its peers only wait for it.
//
// A thread of its own counts this rank's beats in the store and reads the others': rank 0 of all, all of rank 0. Progress plays no part,
// so that a step, a load or an evaluation may take as long as it does. Silence is counted in this process's own seconds, while it runs:
// who was stopped himself takes nobody for gone. A rank is missed after its first beat; where ranks were started together also one that
// never beat.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace uly::comm {

class Store;

struct Beats {
  int64_t rank = 0, size = 1;
  std::string prefix;                 // of the keys
  std::string who;                    // this rank in words: "pid 4711 on node2"
  std::string place;                  // of the store in words: "10.0.0.1:29500"
  bool served_by_first = true;        // a store that does not answer is rank 0's silence
  std::chrono::seconds silence{20};   // after which a rank is taken for gone
  bool together = false;              // all were started at the same time: who has not come kFirstSign after `silence` never will
};

inline constexpr std::chrono::seconds kFirstSign{5};  // what loading one rank's libraries may take longer than another's, besides

class Heartbeat {
 public:
  // Opens a connection of its own by `connect`, which may throw: again and again until the store is there. `lost` is called, once, from
  // the watching thread, with a sentence that names who is silent.
  Heartbeat(const Beats& beats, const std::function<std::shared_ptr<Store>()>& connect, std::function<void(const std::string&)> lost);
  // Before the store ends: others go on to miss this rank, this one misses nobody any more.
  ~Heartbeat();
  Heartbeat(const Heartbeat&) = delete;
  Heartbeat& operator=(const Heartbeat&) = delete;

  struct State;

 private:
  std::shared_ptr<State> state_;
};

}  // namespace uly::comm
