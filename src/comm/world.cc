#include "comm/world.h"

#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <exception>
#include <numeric>
#include <optional>
#include <thread>

#include "base/check.h"
#include "comm/gloo.h"
#include "comm/heartbeat.h"

namespace uly::comm {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr milliseconds kLook{40};    // between looks at whether all have come
constexpr milliseconds kSlow{1000};   // by which an attempt to reach the store ends late
constexpr milliseconds kLeave{4000};  // for who was interrupted to tell the others, which may be loading their libraries

std::optional<std::string> variable(const char* name) {
  const char* value = std::getenv(name);
  return value && *value ? std::optional<std::string>(value) : std::nullopt;
}

int64_t number(const char* name, int64_t fallback, int64_t least) {
  const std::optional<std::string> text = variable(name);
  if (!text) return fallback;
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text->data(), text->data() + text->size(), value);
  ULY_USER_CHECK(error == std::errc() && end == text->data() + text->size() && value >= least,
                 "environment variable {}: expected a whole number from {} on, found '{}'", name, least, *text);
  return value;
}

bool is_loopback(const std::string& address) { return address == "localhost" || address == "::1" || address.starts_with("127."); }

std::string first_line(const char* text) {
  const std::string whole = text;
  return whole.substr(0, whole.find('\n'));
}

// How to reach the store, and how long one attempt to may take.
TcpAddress address_of(const Rendezvous& r) {
  constexpr milliseconds kAttempt{2000};
  // By number where all is here: then the server listens at the loopback interface only.
  return {.host = r.one_machine && is_loopback(r.address) ? "127.0.0.1" : r.address, .port = r.port, .patience = kAttempt, .timeout = r.timeout};
}

[[noreturn]] void give_up() { throw Error(Exit::kPreempted, "stopped before the first step; start again"); }

bool interrupted(const Rendezvous& r) { return r.interrupted && r.interrupted(); }

[[noreturn]] void did_not_meet(const Rendezvous& r, Clock::time_point began, const std::string& why) {
  throw DeviceError(fmt::format("rank {}: the {} ranks did not meet at {}:{} within {} s: {}", r.rank, r.size, r.address, r.port, std::chrono::ceil<std::chrono::seconds>(Clock::now() - began).count(), why));
}

// Rank 0 begins to serve it; the others wait until it does.
std::shared_ptr<Store> open_store(const Rendezvous& r) {
  TcpAddress address = address_of(r);
  address.serves = r.rank == 0 && !r.served_elsewhere;
  if (address.serves) address.patience = r.timeout;  // it is there
  const Clock::time_point began = Clock::now();
  Clock::time_point end = began + r.timeout;
  for (bool leaving = false;;) {
    if (!leaving && interrupted(r)) leaving = true, end = Clock::now() + kLeave, address.patience = kLeave / 8;
    const Clock::time_point attempt = Clock::now();
    try {
      return open_tcp_store(address);
    } catch (const std::exception& e) {
      const std::string why = first_line(e.what());
      if (address.serves && (why.find("in use") != std::string::npos || why.find("EADDRINUSE") != std::string::npos))
        user_error("port {} at {} is in use by another program; choose another {}", r.port, r.address, r.by_ulysses ? "with --master_port" : "by the environment variable MASTER_PORT, the same for all ranks");
      if (leaving && Clock::now() > end) give_up();
      if (address.serves || Clock::now() > end) did_not_meet(r, began, why);
      // c10d looks up the names of addresses: where that is slow, an attempt needs as long.
      if (const auto took = std::chrono::duration_cast<milliseconds>(Clock::now() - attempt); !leaving && took > address.patience + kSlow) address.patience = 2 * took;
    }
    std::this_thread::sleep_for(kLook);
  }
}

// Ranks that have opened the store wait here for the others. Rank 0 says when all have come; or, if one was interrupted, that nobody goes
// on: all do the same.
class Meeting {
 public:
  Meeting(const Rendezvous& r, Store& store) : r_(r), store_(store) {}

  void wait() {
    try {
      if (interrupted(r_)) add("stop", 1);  // before it counts as come: who only leaves must not be taken for one that stays
      add("met", 1);
      add(fmt::format("met/{}", r_.rank), 1);
      r_.rank == 0 ? lead() : follow();
    } catch (const Error&) {
      throw;
    } catch (const std::exception& e) {
      if (interrupted(r_)) give_up();
      did_not_meet(r_, began_, first_line(e.what()));
    }
  }

 private:
  int64_t add(const std::string& key, int64_t number) { return store_.add(r_.prefix + key, number); }
  int64_t count(const std::string& key) { return add(key, 0); }

  void lead() {
    for (;;) {
      const bool all = count("met") >= r_.size;
      if (interrupted(r_) || count("stop") > 0) {
        add("go", -1);
        for (const Clock::time_point end = Clock::now() + kLeave; count("left") + 1 < r_.size && Clock::now() < end;) std::this_thread::sleep_for(kLook);
        give_up();
      }
      if (all) break;
      pause([&] { return missing(); });
    }
    add("go", 1);
  }

  void follow() {
    std::optional<Clock::time_point> told;
    for (int64_t go = 0; (go = count("go")) <= 0;) {
      if (go < 0) {
        add("left", 1);
        give_up();
      }
      if (!told && interrupted(r_)) add("stop", 1), told = Clock::now();
      if (told && Clock::now() - *told > kLeave) give_up();  // rank 0 reads it when it comes, if the store is there then
      pause([] { return std::string("rank 0 has not said that all have come"); });
    }
  }

  template <typename Why>
  void pause(Why&& why) {
    const Clock::time_point now = Clock::now();
    if (now - began_ > r_.timeout) did_not_meet(r_, began_, why());
    std::this_thread::sleep_for(now - began_ < kSoon ? kLook : 5 * kLook);
  }

  std::string missing() {
    std::string list;
    for (int64_t rank = 0; rank < r_.size; ++rank)
      if (count(fmt::format("met/{}", rank)) == 0) list += fmt::format("{}{}", list.empty() ? "" : ", ", rank);
    return fmt::format("missing: rank {}", list);
  }

  static constexpr milliseconds kSoon{5000};
  const Rendezvous& r_;
  Store& store_;
  const Clock::time_point began_ = Clock::now();
};

// This process in words.
std::string who() { return fmt::format("pid {} on {}", ::getpid(), machine_name()); }

std::unique_ptr<Heartbeat> make_heartbeat(const Rendezvous& r) {
  if (r.size == 1 || r.silence.count() == 0) return nullptr;
  const Beats beats{.rank = r.rank, .size = r.size, .prefix = r.prefix, .who = who(), .place = fmt::format("{}:{}", r.address, r.port), .served_by_first = !r.served_elsewhere, .silence = r.silence, .together = r.together};
  return std::make_unique<Heartbeat>(beats, [address = address_of(r)] { return open_tcp_store(address); }, [](const std::string& words) { throw DeviceError(words); });
}

}  // namespace

std::string machine_name() {
  char name[256] = "this machine";
  ::gethostname(name, sizeof name - 1);
  return variable("ULYSSES_HOST").value_or(name);
}

Rendezvous rendezvous_from_environment() {
  Rendezvous r;
  if (!variable("RANK") || !variable("WORLD_SIZE")) return r;
  r.size = number("WORLD_SIZE", 1, 1);
  r.rank = number("RANK", 0, 0);
  ULY_USER_CHECK(r.rank < r.size, "environment variable RANK: expected a number below WORLD_SIZE = {}, found {}", r.size, r.rank);
  r.address = variable("MASTER_ADDR").value_or(r.address);
  r.port = static_cast<int>(number("MASTER_PORT", r.port, 1));
  ULY_USER_CHECK(r.port < 65536, "environment variable MASTER_PORT: expected a port from 1 to 65535, found {}", r.port);
  r.one_machine = is_loopback(r.address) || number("LOCAL_WORLD_SIZE", 0, 1) == r.size;
  r.prefix = variable("ULYSSES_JOB_TOKEN").value_or(r.prefix);
  const std::string started = variable("ULYSSES_STARTED").value_or("");
  r.together = started == "together";
  r.by_ulysses = !started.empty();
  r.silence = std::chrono::seconds(number("ULYSSES_SILENCE", r.silence.count(), 0));
  // torchrun's agent keeps the store at this address and numbers its restarts.
  if (variable("TORCHELASTIC_USE_AGENT_STORE").value_or("") == "True") {
    r.served_elsewhere = true;
    r.prefix = fmt::format("ulysses/{}/", number("TORCHELASTIC_RESTART_COUNT", 0, 0));
  }
  return r;
}

World::World(Rendezvous rendezvous, std::shared_ptr<Store> store) : rendezvous_(std::move(rendezvous)), store_(std::move(store)) {
  std::vector<int64_t> ranks(static_cast<size_t>(rendezvous_.size));
  std::iota(ranks.begin(), ranks.end(), 0);
  all_ = subgroup(ranks, "world");
}
World::World(World&&) noexcept = default;
World& World::operator=(World&&) noexcept = default;
World::~World() = default;

World World::join(const Rendezvous& rendezvous) {
  std::unique_ptr<Heartbeat> heartbeat = make_heartbeat(rendezvous);  // first of all: it finds who does not even come
  const std::shared_ptr<Store> store = rendezvous.size > 1 ? open_store(rendezvous) : nullptr;
  if (store) Meeting(rendezvous, *store).wait();
  World world(rendezvous, store);
  world.heartbeat_ = std::move(heartbeat);
  return world;
}

std::vector<World> World::threads(int64_t size, std::chrono::milliseconds timeout, int64_t piece_bytes) {
  const std::shared_ptr<Store> store = size > 1 ? make_thread_store() : nullptr;
  std::vector<std::optional<World>> made(static_cast<size_t>(size));
  std::vector<std::exception_ptr> errors(made.size());
  std::vector<std::thread> threads;
  for (size_t i = 0; i < made.size(); ++i)
    threads.emplace_back([&, i] {
      try {
        Rendezvous r;
        r.rank = static_cast<int64_t>(i);
        r.size = size;
        r.timeout = timeout;
        r.piece_bytes = piece_bytes;
        made[i] = World(r, store);
      } catch (...) {
        errors[i] = std::current_exception();
      }
    });
  for (std::thread& t : threads) t.join();
  for (const std::exception_ptr& e : errors)
    if (e) std::rethrow_exception(e);
  std::vector<World> worlds;
  for (std::optional<World>& w : made) worlds.push_back(std::move(*w));
  return worlds;
}

std::unique_ptr<Group> World::subgroup(const std::vector<int64_t>& ranks, const std::string& name) {
  const auto me = std::find(ranks.begin(), ranks.end(), rank());
  ULY_CHECK(me != ranks.end(), "a rank makes only groups that it belongs to");
  Members members{name, ranks, me - ranks.begin()};
  if (ranks.size() == 1) return std::make_unique<Group>(std::move(members), nullptr, rendezvous_.piece_bytes);
  std::string key = rendezvous_.prefix + name;
  for (int64_t r : ranks) key += fmt::format(",{}", r);
  std::unique_ptr<Mesh> mesh;
  try {
    mesh =
        std::make_unique<Mesh>(*store_, key, members.mine, static_cast<int64_t>(ranks.size()), rendezvous_.one_machine ? "127.0.0.1" : address_towards(rendezvous_.address, rendezvous_.port), rendezvous_.timeout);
  } catch (const std::exception& e) {
    throw DeviceError(fmt::format("rank {}: could not connect to the {} ranks of group '{}': {}", rank(), ranks.size(), name, first_line(e.what())));
  }
  return std::make_unique<Group>(std::move(members), std::move(mesh), rendezvous_.piece_bytes);
}

}  // namespace uly::comm
