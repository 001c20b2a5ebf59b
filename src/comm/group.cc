#include "comm/group.h"

#include <algorithm>
#include <cstring>
#include <functional>

#include "base/check.h"
#include "comm/gloo.h"

namespace uly::comm {
namespace {

// Below this many bytes in all, every rank sums everything: one exchange in place of two.
constexpr int64_t kSmallBytes = 64 * 1024;
constexpr int32_t kPiecesPerMessage = 1024;
constexpr int32_t kOperations = 1 << 19;  // tags come round after so many; far more than can be in flight

struct Out {
  const void* data = nullptr;
  int64_t bytes = 0;
};
struct In {
  void* data = nullptr;
  int64_t bytes = 0;
};

// Gloo starts its messages with "[/path/pair.cc:547] " or "../path/pair.cc:547 "; people need what follows.
std::string plain(const char* what) {
  std::string text = what;
  text = text.substr(0, text.find('\n'));
  if (!text.empty() && text[0] == '[')
    if (const size_t end = text.find("] "); end != std::string::npos) text = text.substr(end + 2);
  return text;
}

}  // namespace

struct Group::State {
  Members members;
  std::unique_ptr<Mesh> mesh;
  int64_t piece_bytes = kPieceBytes;
  int32_t operation = 0;

  int64_t rank() const { return members.mine; }
  int64_t size() const { return static_cast<int64_t>(members.ranks.size()); }
  int32_t next_tag() { return (operation = (operation + 1) % kOperations) * kPiecesPerMessage; }

  [[noreturn]] void fail(const char* name, int64_t peer, const std::exception& e) const {
    throw DeviceError(fmt::format("rank {}: {} in group '{}' of {} ranks failed at rank {}: {}", members.ranks[static_cast<size_t>(rank())], name, members.name,
                                  size(), members.ranks[static_cast<size_t>(peer)], plain(e.what())));
  }
};

struct Work::State {
  struct Pending {
    std::unique_ptr<Message> message;
    int64_t peer = 0;
  };
  std::shared_ptr<Group::State> group;
  const char* name = "";
  std::vector<Pending> pending;
  std::vector<std::byte> scratch;
  std::function<void(State&)> finish;  // what remains to be done with what was received

  void wait_for_messages() {
    for (Pending& p : pending) {
      try {
        p.message->wait();
      } catch (const std::exception& e) {
        group->fail(name, p.peer, e);
      }
    }
    pending.clear();
  }

  // Starts one exchange: in[p] from and out[p] to each rank p. Receives first: a message that finds its buffer waiting
  // is not held up.
  void start(const std::vector<In>& in, const std::vector<Out>& out) {
    const int64_t me = group->rank(), size = group->size();
    const In& in_me = in[static_cast<size_t>(me)];
    const Out& out_me = out[static_cast<size_t>(me)];
    ULY_CHECK_EQ(in_me.bytes, out_me.bytes, "bytes a rank sends to itself");
    if (in_me.bytes > 0 && in_me.data != out_me.data) std::memmove(in_me.data, out_me.data, static_cast<size_t>(in_me.bytes));
    if (size == 1) return;
    const int32_t tag = group->next_tag();
    for (int64_t i = 1; i < size; ++i) {
      const int64_t from = (me + size - i) % size;
      const In& block = in[static_cast<size_t>(from)];
      pieces(block.bytes, from,
             [&](int64_t at, int64_t n, int32_t k) { return group->mesh->receive(static_cast<std::byte*>(block.data) + at, n, from, tag + k); });
    }
    for (int64_t i = 1; i < size; ++i) {
      const int64_t to = (me + i) % size;
      const Out& block = out[static_cast<size_t>(to)];
      pieces(block.bytes, to,
             [&](int64_t at, int64_t n, int32_t k) { return group->mesh->send(static_cast<const std::byte*>(block.data) + at, n, to, tag + k); });
    }
  }

 private:
  template <typename Post>
  void pieces(int64_t bytes, int64_t peer, const Post& post) {
    ULY_CHECK(bytes >= 0 && bytes <= group->piece_bytes * kPiecesPerMessage, "bytes of one message");
    int32_t k = 0;
    for (int64_t at = 0; at < bytes; at += group->piece_bytes, ++k) {
      try {
        pending.push_back({post(at, std::min(group->piece_bytes, bytes - at), k), peer});
      } catch (const std::exception& e) {
        group->fail(name, peer, e);
      }
    }
  }
};

Work::Work() = default;
Work::Work(std::unique_ptr<State> state) : state_(std::move(state)) {}
Work::Work(Work&&) noexcept = default;
Work& Work::operator=(Work&&) noexcept = default;
Work::~Work() = default;

void Work::wait() {
  if (!state_) return;
  const std::unique_ptr<State> state = std::move(state_);
  state->wait_for_messages();
  if (state->finish) state->finish(*state);
}

namespace {

// Returns where part p begins when `count` elements are cut into `size` parts of nearly equal size.
int64_t first_of(int64_t count, int64_t p, int64_t size) { return count / size * p + std::min(p, count % size); }

template <typename T>
void sum_pieces(T* y, const std::byte* pieces, int64_t stride_elements, int64_t count, int64_t size) {
  const T* x = reinterpret_cast<const T*>(pieces);
  for (int64_t i = 0; i < count; ++i) {
    T total = x[i];
    for (int64_t p = 1; p < size; ++p) total += x[p * stride_elements + i];
    y[i] = total;
  }
}

// One exchange: everybody gets everything and sums it.
template <typename T>
void reduce_small(Work::State& work, T* x, int64_t count) {
  const int64_t size = work.group->size(), bytes = count * static_cast<int64_t>(sizeof(T));
  work.scratch.resize(static_cast<size_t>(bytes * size));
  std::vector<In> in;
  for (int64_t p = 0; p < size; ++p) in.push_back({work.scratch.data() + p * bytes, bytes});
  work.start(in, std::vector<Out>(static_cast<size_t>(size), Out{x, bytes}));
  work.finish = [x, count, size](Work::State& w) { sum_pieces(x, w.scratch.data(), count, count, size); };
}

// Two exchanges: each rank sums one part, then all gather the parts; the second runs within wait().
template <typename T>
void reduce_large(Work::State& work, T* x, int64_t count) {
  const int64_t size = work.group->size(), me = work.group->rank(), width = sizeof(T);
  const int64_t mine = first_of(count, me + 1, size) - first_of(count, me, size);
  work.scratch.resize(static_cast<size_t>(mine * size * width));
  std::vector<In> in;
  std::vector<Out> out;
  for (int64_t p = 0; p < size; ++p) {
    const int64_t first = first_of(count, p, size);
    in.push_back({work.scratch.data() + p * mine * width, mine * width});
    out.push_back({x + first, (first_of(count, p + 1, size) - first) * width});
  }
  work.start(in, out);
  work.finish = [=](Work::State& w) {
    T* part = x + first_of(count, me, size);
    sum_pieces(part, w.scratch.data(), mine, mine, size);
    std::vector<In> parts;
    for (int64_t p = 0; p < size; ++p) {
      const int64_t first = first_of(count, p, size);
      parts.push_back({x + first, (first_of(count, p + 1, size) - first) * width});
    }
    w.start(parts, std::vector<Out>(static_cast<size_t>(size), Out{part, mine * width}));
    w.wait_for_messages();
  };
}

std::unique_ptr<Work::State> begin(std::shared_ptr<Group::State> group, const char* name) {
  auto state = std::make_unique<Work::State>();
  state->group = std::move(group);
  state->name = name;
  return state;
}

template <typename T>
Work reduce(std::unique_ptr<Work::State> work, T* x, int64_t count) {
  const int64_t size = work->group->size();
  if (size == 1) return Work();
  if (count * static_cast<int64_t>(sizeof(T)) * size <= kSmallBytes)
    reduce_small(*work, x, count);
  else
    reduce_large(*work, x, count);
  return Work(std::move(work));
}

}  // namespace

Group::Group(Members members, std::unique_ptr<Mesh> mesh, int64_t piece_bytes) : state_(std::make_shared<State>()) {
  ULY_CHECK(mesh || members.ranks.size() == 1, "a group of several ranks needs a mesh");
  state_->members = std::move(members);
  state_->mesh = std::move(mesh);
  state_->piece_bytes = piece_bytes;
}
Group::~Group() = default;

int64_t Group::rank() const { return state_->rank(); }
int64_t Group::size() const { return state_->size(); }
const Members& Group::members() const { return state_->members; }

Work Group::all_to_all(void* receive, const void* send, const std::vector<int64_t>& receive_bytes, const std::vector<int64_t>& send_bytes) {
  ULY_CHECK_EQ(static_cast<int64_t>(receive_bytes.size()), size(), "counts of an all_to_all");
  ULY_CHECK_EQ(static_cast<int64_t>(send_bytes.size()), size(), "counts of an all_to_all");
  auto work = begin(state_, "all_to_all");
  std::vector<In> in;
  std::vector<Out> out;
  std::byte* to = static_cast<std::byte*>(receive);
  const std::byte* from = static_cast<const std::byte*>(send);
  for (size_t p = 0; p < send_bytes.size(); ++p) {
    in.push_back({to, receive_bytes[p]});
    out.push_back({from, send_bytes[p]});
    to += receive_bytes[p];
    from += send_bytes[p];
  }
  work->start(in, out);
  return Work(std::move(work));
}

Work Group::all_gather(void* whole, const void* shard, int64_t bytes) {
  auto work = begin(state_, "all_gather");
  std::vector<In> in;
  for (int64_t p = 0; p < size(); ++p) in.push_back({static_cast<std::byte*>(whole) + p * bytes, bytes});
  work->start(in, std::vector<Out>(in.size(), Out{shard, bytes}));
  return Work(std::move(work));
}

Work Group::all_reduce_sum(float* x, int64_t count) { return reduce(begin(state_, "all_reduce"), x, count); }
Work Group::all_reduce_sum(double* x, int64_t count) { return reduce(begin(state_, "all_reduce"), x, count); }

Work Group::broadcast(void* x, int64_t bytes, int64_t root) {
  auto work = begin(state_, "broadcast");
  std::vector<In> in(static_cast<size_t>(size()));
  std::vector<Out> out(static_cast<size_t>(size()));
  if (rank() == root)
    for (int64_t p = 0; p < size(); ++p) out[static_cast<size_t>(p)] = p == root ? Out{} : Out{x, bytes};
  else
    in[static_cast<size_t>(root)] = {x, bytes};
  work->start(in, out);
  return Work(std::move(work));
}

void Group::barrier() {
  auto work = begin(state_, "barrier");
  std::vector<char> seen(static_cast<size_t>(size()));
  const char here = 1;
  std::vector<In> in;
  for (char& c : seen) in.push_back({&c, 1});
  work->start(in, std::vector<Out>(in.size(), Out{&here, 1}));
  Work(std::move(work)).wait();
}

std::vector<std::string> Group::exchange(const std::string& mine) {
  const std::vector<int64_t> lengths = gather({static_cast<int64_t>(mine.size())});
  std::vector<std::string> all;
  for (int64_t n : lengths) all.emplace_back(static_cast<size_t>(n), '\0');
  std::vector<In> in;
  for (std::string& s : all) in.push_back({s.data(), static_cast<int64_t>(s.size())});
  auto work = begin(state_, "exchange of texts");
  work->start(in, std::vector<Out>(in.size(), Out{mine.data(), static_cast<int64_t>(mine.size())}));
  Work(std::move(work)).wait();
  return all;
}

std::vector<int64_t> Group::gather(const std::vector<int64_t>& mine) {
  std::vector<int64_t> all(mine.size() * static_cast<size_t>(size()));
  all_gather(all.data(), mine.data(), static_cast<int64_t>(mine.size() * sizeof(int64_t))).wait();
  return all;
}

std::vector<int64_t> Group::sum(const std::vector<int64_t>& mine) {
  const std::vector<int64_t> all = gather(mine);
  std::vector<int64_t> total(mine.size(), 0);
  for (size_t i = 0; i < all.size(); ++i) total[i % mine.size()] += all[i];
  return total;
}

std::vector<int64_t> Group::max(const std::vector<int64_t>& mine) {
  const std::vector<int64_t> all = gather(mine);
  std::vector<int64_t> largest = mine;
  for (size_t i = 0; i < all.size(); ++i) largest[i % mine.size()] = std::max(largest[i % mine.size()], all[i]);
  return largest;
}

}  // namespace uly::comm
