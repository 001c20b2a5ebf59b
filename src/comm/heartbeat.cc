#include "comm/heartbeat.h"

#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "base/check.h"
#include "comm/gloo.h"

namespace uly::comm {

using std::chrono::milliseconds;
using std::chrono::seconds;

namespace {

constexpr milliseconds kBeat{2000}, kFirstBeats{200};  // between beats; until it is known who is watched
constexpr seconds kTick{1};        // of the watching thread's clock
constexpr seconds kFarewell{2};    // for a beat on its way at the end

}  // namespace

struct Heartbeat::State {
  State(Beats b, std::function<std::shared_ptr<Store>()> c, std::function<void(const std::string&)> l) : beats(std::move(b)), connect(std::move(c)), lost(std::move(l)) {
    if (beats.rank > 0) seen.resize(1);
    else seen.resize(static_cast<size_t>(beats.size));
  }

  struct Seen {
    int64_t count = 0;  // beats
    int64_t tick = -1;  // when the last one was seen; -1: there was none
    std::string who;
  };

  std::string key(const char* what, int64_t rank) const { return fmt::format("{}{}/{}", beats.prefix, what, rank); }

  // One round: a beat of this rank, a look at those that it watches. Not under the lock: a store that has stopped does not return.
  void round() {
    store->add(key("beats", beats.rank), 1);
    for (size_t r = 0; r < seen.size(); ++r) {
      if (static_cast<int64_t>(r) == beats.rank) continue;
      const int64_t count = store->add(key("beats", static_cast<int64_t>(r)), 0);
      std::string who;
      if (count > 0 && seen[r].who.empty()) who = store->get(key("who", static_cast<int64_t>(r)));
      const std::lock_guard lock(mutex);
      if (!who.empty()) seen[r].who = who;
      if (count != seen[r].count) seen[r].count = count, seen[r].tick = tick;
    }
    const std::lock_guard lock(mutex);
    answered = tick;
  }

  // False where this rank ends before.
  bool reach_store() {
    for (;;) {
      try {
        store = connect();
        return true;
      } catch (const std::exception&) {
        // Who keeps it has not come yet.
      }
      std::unique_lock lock(mutex);
      if (changed.wait_for(lock, kFirstBeats, [&] { return stopped; })) return false;
    }
  }

  void beat() {
    if (reach_store()) try {
      store->set(key("who", beats.rank), beats.who);
      for (;;) {
        round();
        std::unique_lock lock(mutex);
        if (changed.wait_for(lock, all_known() ? kBeat : kFirstBeats, [&] { return stopped; })) break;
      }
    } catch (const std::exception&) {
      // Who keeps the store is gone: it is silent from now on.
    }
    store.reset();
    const std::lock_guard lock(mutex);
    beating = false;
    changed.notify_all();
  }

  bool all_known() const {
    for (size_t r = 0; r < seen.size(); ++r)
      if (static_cast<int64_t>(r) != beats.rank && seen[r].tick < 0) return false;
    return true;
  }

  // Who has been silent for too long; "" if nobody. Under the lock.
  std::string missing() const {
    const int64_t limit = beats.silence.count(), first = limit + kFirstSign.count();
    const auto never_came = [&](int64_t last) { return last < 0 && beats.together && tick > first; };
    const auto name = [](int64_t rank, const Seen& s) { return s.who.empty() ? fmt::format("rank {}", rank) : fmt::format("rank {} ({})", rank, s.who); };
    std::string gone, late;
    const auto add = [&](std::string& to, const std::string& who) { to += (to.empty() ? "" : ", ") + who; };
    if (beats.rank > 0 && answered >= 0 && tick - answered > limit) add(gone, beats.served_by_first ? name(0, seen[0]) : "the store at " + beats.place);
    else if (beats.rank > 0 && never_came(answered)) add(late, name(0, seen[0]));
    else
      for (size_t r = 0; r < seen.size(); ++r) {
        if (static_cast<int64_t>(r) == beats.rank || (beats.rank > 0 && r > 0)) continue;
        if (seen[r].tick >= 0 && tick - seen[r].tick > limit) add(gone, name(static_cast<int64_t>(r), seen[r]));
        else if (never_came(seen[r].tick)) add(late, name(static_cast<int64_t>(r), seen[r]));
      }
    if (!late.empty() && gone.empty())
      return fmt::format("{}: no sign of life in the {} s since the start: stopped or hung, or its machine or the link to it is down (if its libraries take longer to load, more seconds by ULYSSES_SILENCE)", late, first);
    return gone.empty() ? "" : fmt::format("{}: no sign of life for {} s: stopped or hung, or its machine or the link to it is down", gone, limit);
  }

  void watch() {
    std::unique_lock lock(mutex);
    while (!changed.wait_for(lock, kTick, [&] { return stopped; })) {
      ++tick;
      if (const std::string words = missing(); !words.empty()) {
        lock.unlock();
        return lost(words);
      }
    }
  }

  const Beats beats;
  const std::function<std::shared_ptr<Store>()> connect;
  std::shared_ptr<Store> store;  // the beating thread's
  const std::function<void(const std::string&)> lost;
  std::mutex mutex;
  std::condition_variable changed;
  bool stopped = false, beating = true;
  int64_t tick = 0, answered = -1;  // when the store last answered; -1: never
  std::vector<Seen> seen;  // rank 0: of all; the others: of rank 0
};

Heartbeat::Heartbeat(const Beats& beats, const std::function<std::shared_ptr<Store>()>& connect, std::function<void(const std::string&)> lost) : state_(std::make_shared<State>(beats, connect, std::move(lost))) {
  std::thread([state = state_] { state->beat(); }).detach();
  std::thread([state = state_] { state->watch(); }).detach();
}

Heartbeat::~Heartbeat() {
  std::unique_lock lock(state_->mutex);
  state_->stopped = true;
  state_->changed.notify_all();
  state_->changed.wait_for(lock, kFarewell, [&] { return !state_->beating; });
}

}  // namespace uly::comm
