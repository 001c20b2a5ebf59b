#include "plan/price.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <limits>
#include <numeric>

#include "base/check.h"
#include "base/shapes.h"

namespace uly::plan {

using ops::Buffer;

namespace {

constexpr int64_t kForEver = std::numeric_limits<int64_t>::max();

int64_t end_of(const Lifetime& life) { return life.death < 0 ? kForEver : life.death; }
int64_t taken(const Lifetime& life) { return round_up(life.bytes, ops::place_alignment(life.tier)); }

// The buffers that have been placed in one tier, by the stretches of time in which they are alive.
class Placed {
 public:
  explicit Placed(int64_t end) : stretch_(end / kStretches + 1), lists_(kStretches) {}

  void add(size_t i, const Lifetime& life) { over(life, [&](std::vector<size_t>& list) { list.push_back(i); }); }

  // Calls f for each that may be alive with `life`, some more than once.
  template <typename F>
  void for_each(const Lifetime& life, F&& f) {
    over(life, [&](std::vector<size_t>& list) { std::for_each(list.begin(), list.end(), f); });
  }

 private:
  static constexpr int64_t kStretches = 128;

  template <typename F>
  void over(const Lifetime& life, F&& f) {
    const int64_t last = life.death < 0 ? kStretches - 1 : std::min(kStretches - 1, life.death / stretch_);
    for (int64_t i = life.birth / stretch_; i <= last; ++i) f(lists_[static_cast<size_t>(i)]);
  }

  int64_t stretch_;
  std::vector<std::vector<size_t>> lists_;
};

// In the given order, each at the lowest place that is free for its whole life.
Places place_in_order(const std::vector<Lifetime>& lives, const std::vector<size_t>& order) {
  Places places;
  places.offset_bytes.assign(lives.size(), 0);
  int64_t end = 0;
  for (const Lifetime& life : lives) end = std::max({end, life.birth, life.death});
  std::vector<Placed> placed(ops::kNumTiers, Placed(end));
  std::vector<size_t> seen_for(lives.size(), lives.size());
  std::vector<std::pair<int64_t, int64_t>> busy;
  for (const size_t i : order) {
    const size_t tier = static_cast<size_t>(lives[i].tier);
    busy.clear();
    placed[tier].for_each(lives[i], [&](size_t j) {
      if (seen_for[j] == i || lives[j].birth >= end_of(lives[i]) || lives[i].birth >= end_of(lives[j])) return;
      seen_for[j] = i;
      busy.emplace_back(places.offset_bytes[j], places.offset_bytes[j] + taken(lives[j]));
    });
    std::sort(busy.begin(), busy.end());
    int64_t at = 0;
    for (const auto& [from, to] : busy) {
      if (from - at >= lives[i].bytes) break;
      at = std::max(at, to);
    }
    places.offset_bytes[i] = at;
    places.arena_bytes[tier] = std::max(places.arena_bytes[tier], at + taken(lives[i]));
    placed[tier].add(i, lives[i]);
  }
  return places;
}

// The most that is alive at once: no places need less.
std::array<int64_t, ops::kNumTiers> peaks(const std::vector<Lifetime>& lives) {
  std::vector<std::pair<int64_t, size_t>> changes;  // time, and twice the buffer, one more for its birth
  for (size_t i = 0; i < lives.size(); ++i) {
    changes.emplace_back(lives[i].birth, 2 * i + 1);
    if (lives[i].death >= 0) changes.emplace_back(lives[i].death, 2 * i);
  }
  std::sort(changes.begin(), changes.end());
  std::array<int64_t, ops::kNumTiers> alive{}, most{};
  for (const auto& [when, what] : changes) {
    const Lifetime& life = lives[what / 2];
    const size_t tier = static_cast<size_t>(life.tier);
    alive[tier] += what % 2 == 1 ? taken(life) : -taken(life);
    most[tier] = std::max(most[tier], alive[tier]);
  }
  return most;
}

}  // namespace

Places place(const std::vector<Lifetime>& lives) {
  // No order is best for all programs; one of these wastes next to nothing mostly, the more if what came to lie too high is given its
  // place first.
  constexpr int kRounds = 4;
  constexpr int64_t kLittle = 250;  // of so many parts one
  const auto size_class = [&](size_t i) { return std::bit_width(static_cast<uint64_t>(lives[i].bytes)); };
  const auto span = [&](size_t i) { return end_of(lives[i]) - lives[i].birth; };
  const std::array<std::function<bool(size_t, size_t)>, 4> comes_first = {[&](size_t a, size_t b) { return size_class(a) != size_class(b) ? size_class(a) > size_class(b) : span(a) > span(b); },
                                                                          [&](size_t a, size_t b) { return lives[a].bytes > lives[b].bytes; }, [&](size_t a, size_t b) { return span(a) > span(b); },
                                                                          [&](size_t a, size_t b) { return size_class(a) != size_class(b) ? size_class(a) > size_class(b) : end_of(lives[a]) > end_of(lives[b]); }};
  Places best;
  best.offset_bytes.resize(lives.size());
  best.arena_bytes.fill(kForEver);
  for (const Lifetime& life : lives) best.bytes.push_back(life.bytes);
  const std::array<int64_t, ops::kNumTiers> least = peaks(lives);
  const auto is_good = [&] { return std::equal(least.begin(), least.end(), best.arena_bytes.begin(), [](int64_t bytes, int64_t found) { return found <= bytes + bytes / kLittle; }); };
  for (int round = 0; round < static_cast<int>(comes_first.size()) * kRounds && !is_good();) {
    std::vector<size_t> order(lives.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), comes_first[static_cast<size_t>(round / kRounds)]);
    do {
      const Places places = place_in_order(lives, order);
      for (size_t t = 0; t < least.size(); ++t) {
        if (places.arena_bytes[t] >= best.arena_bytes[t]) continue;
        best.arena_bytes[t] = places.arena_bytes[t];
        for (size_t i = 0; i < lives.size(); ++i)
          if (static_cast<size_t>(lives[i].tier) == t) best.offset_bytes[i] = places.offset_bytes[i];
      }
      std::stable_partition(order.begin(), order.end(), [&](size_t i) { return places.offset_bytes[i] + taken(lives[i]) > least[static_cast<size_t>(lives[i].tier)]; });
    } while (++round % kRounds != 0 && !is_good());
  }
  return best;
}

Priced::Priced(const std::array<int64_t, 2>& group_sizes, int64_t s, int64_t document_table_bytes, const Rates& rates, bool record) : group_sizes_(group_sizes), rates_(rates), record_(record) {
  for (Buffer& b : inputs_) b = make(s, 1, Dtype::kI64, ops::Kind::kInputs, "token ids, labels, positions", ops::Life::kStep, ops::Tier::kDevice);
  if (document_table_bytes > 0) make(1, document_table_bytes, Dtype::kU8, ops::Kind::kInputs, "table of documents", ops::Life::kStep, ops::Tier::kDevice);
}

Price Priced::price() const {
  Price p = price_;
  for (size_t t = 0; t < p.tiers.size(); ++t) p.tiers[t].peak_where = peak_at_[t].second < 0 ? peak_at_[t].first : fmt::format("{}, layer {}", peak_at_[t].first, peak_at_[t].second);
  p.run_places = place(run_);
  p.step_places = place(step_);
  return p;
}

Buffer Priced::make(int64_t rows, int64_t columns, Dtype dtype, ops::Kind kind, std::string_view, ops::Life life, ops::Tier tier) {
  std::vector<Lifetime>& lives = life == ops::Life::kRun ? run_ : step_;
  Buffer b{.id = static_cast<int32_t>(lives.size()), .life = life, .tier = tier, .dtype = dtype, .offset = 0, .rows = rows, .columns = columns, .stride = columns};
  lives.push_back({.tier = tier, .bytes = b.bytes(), .birth = clock_++, .death = -1});
  const int64_t bytes = round_up(b.bytes(), ops::place_alignment(tier));
  TierPrice& price = price_.tiers[static_cast<size_t>(tier)];
  if (life == ops::Life::kRun) {
    price.run_bytes += bytes;
    price.run_by_kind[static_cast<size_t>(kind)] += bytes;
    return b;
  }
  kinds_.push_back(kind);
  int64_t& live = live_[static_cast<size_t>(tier)];
  auto& by_kind = live_by_kind_[static_cast<size_t>(tier)];
  live += bytes;
  by_kind[static_cast<size_t>(kind)] += bytes;
  if (live > price.peak_bytes) {
    price.peak_bytes = live;
    price.peak_by_kind = by_kind;
    auto& [where, layer] = peak_at_[static_cast<size_t>(tier)];
    where = where_, layer = layer_;
  }
  return b;
}

void Priced::release(const Buffer& b) {
  ULY_CHECK(b.life == ops::Life::kStep, "only a step's buffers are released");
  Lifetime& life = step_[static_cast<size_t>(b.id)];
  ULY_CHECK(life.death < 0, "a buffer was released twice");
  life.death = clock_++;
  const int64_t bytes = round_up(life.bytes, ops::place_alignment(life.tier));
  live_[static_cast<size_t>(life.tier)] -= bytes;
  live_by_kind_[static_cast<size_t>(life.tier)][static_cast<size_t>(kinds_[static_cast<size_t>(b.id)])] -= bytes;
}

Buffer Priced::input(ops::Input which) { return inputs_[static_cast<size_t>(which)]; }

void Priced::mark(std::string_view where, int64_t layer) {
  where_ = where;
  layer_ = layer;
  if (record_) price_.marks.push_back({where_, free_at_[0]});
}

namespace {

double over(double amount, double rate) { return rate > 0 ? amount / rate : 0; }

}  // namespace

void Priced::note(Stream stream, double begin, double end) {
  if (!record_ || end <= begin) return;
  std::vector<Price::Interval>& of = price_.intervals[static_cast<size_t>(stream)];
  if (!of.empty() && of.back().end >= begin) of.back().end = end;
  else of.push_back({begin, end});
}

void Priced::for_tiles(int64_t rows, int64_t tile, const TileBody& body) {
  const int64_t clock = clock_, whole = rows / tile, rest = rows % tile;
  const size_t events = events_.size();
  if (whole > 0) {
    times_ = static_cast<double>(whole);
    body(0, tile);
    times_ = 1;
  }
  if (rest > 0) body(rows - rest, rest);
  ULY_CHECK(clock_ == clock && events_.size() == events, "a tile makes, moves or exchanges something");
}

void Priced::compute(double seconds) {
  seconds *= times_;
  note(Stream::kCompute, free_at_[0], free_at_[0] + seconds);
  free_at_[0] += seconds;
  price_.busy[0] += seconds;
  price_.seconds = std::max(price_.seconds, free_at_[0]);
}

ops::Event Priced::aside(Stream stream, double seconds) {
  double& free_at = free_at_[static_cast<size_t>(stream)];
  const double begin = std::max(free_at, free_at_[0]);
  free_at = begin + seconds;
  if (rates_.shares_cores && stream != Stream::kDisk) compute(seconds);
  note(stream, begin, free_at);
  price_.busy[static_cast<size_t>(stream)] += seconds;
  price_.seconds = std::max(price_.seconds, free_at);
  events_.emplace_back(stream, free_at);
  return {static_cast<int32_t>(events_.size()) - 1};
}

void Priced::wait(ops::Event event) {
  if (event.id < 0) return;
  const auto& [stream, at] = events_[static_cast<size_t>(event.id)];
  if (at <= free_at_[0]) return;
  price_.waited[static_cast<size_t>(stream)] += at - free_at_[0];
  free_at_[0] = at;
}

void Priced::moved(std::initializer_list<Buffer> buffers) {
  double bytes = 0;
  for (const Buffer& b : buffers) bytes += static_cast<double>(b.bytes());
  price_.moved_bytes += times_ * bytes;
  compute(over(bytes, rates_.device_bytes));
}

void Priced::gemm(int64_t m, int64_t n, int64_t k) {
  const double flops = 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
  price_.gemm_flops += times_ * flops;
  compute(over(flops, rates_.gemm_flops));
}

ops::Event Priced::move(Buffer y, Buffer x) {
  ULY_CHECK(y.tier != x.tier && y.bytes() == x.bytes() && y.contiguous() && x.contiguous(), "a move is between tiers");
  const double bytes = static_cast<double>(x.bytes());
  if (y.tier == ops::Tier::kDisk || x.tier == ops::Tier::kDisk) return aside(Stream::kDisk, over(bytes, rates_.disk_bytes));
  if (y.tier == ops::Tier::kHost) return aside(Stream::kToHost, over(bytes, rates_.to_host_bytes));
  return aside(Stream::kToDevice, over(bytes, rates_.to_device_bytes));
}

void Priced::attend(double flops, double rate, int64_t rows, const ops::AttentionSchedule& schedule) {
  price_.attention_flops += flops;
  const double length = schedule.document_share * static_cast<double>(rows);  // of a document, weighted by what it computes
  compute(over(flops, rate) * (1 + std::min(1.0, over(rates_.attention_half_tokens, length))));
}

void Priced::attention(Buffer o_SnH, Buffer, Buffer, Buffer, const ops::Heads&, const ops::AttentionSchedule& schedule) {
  const double flops = schedule.document_share * 2.0 * static_cast<double>(o_SnH.rows) * static_cast<double>(o_SnH.rows) * static_cast<double>(o_SnH.columns);
  attend(flops, rates_.attention_forward_flops, o_SnH.rows, schedule);
}

void Priced::attention_grad(Buffer, Buffer do_SnH, Buffer, Buffer, Buffer, Buffer, const ops::Heads&, const ops::AttentionSchedule& schedule) {
  const double flops = schedule.document_share * 5.0 * static_cast<double>(do_SnH.rows) * static_cast<double>(do_SnH.rows) * static_cast<double>(do_SnH.columns);
  attend(flops, rates_.attention_backward_flops, do_SnH.rows, schedule);
}

double Priced::sent_bytes_total(const std::vector<int64_t>& elements, Dtype dtype) const {
  return static_cast<double>(std::accumulate(elements.begin(), elements.end(), int64_t{0})) * static_cast<double>(bytes_of(dtype));
}

ops::Event Priced::all_to_all(Buffer, Buffer send, ops::Group, const std::vector<int64_t>&, const std::vector<int64_t>& send_elements) {
  const double bytes = sent_bytes_total(send_elements, send.dtype), ranks = static_cast<double>(send_elements.size());
  price_.exchanged_bytes += bytes;
  return aside(Stream::kNetwork, over(bytes * (ranks - 1) / ranks, rates_.sequence_bytes));  // a rank's own block stays
}

ops::Event Priced::all_gather(Buffer whole, Buffer shard, ops::Group group) {
  const double bytes = static_cast<double>(whole.bytes() - shard.bytes());
  price_.gathered_bytes += bytes;
  return aside(Stream::kNetwork, over(bytes, group == ops::Group::kNode ? rates_.node_bytes : rates_.gather_bytes));
}

ops::Event Priced::scatter(Buffer received, Buffer, ops::Group group) {
  const double bytes = static_cast<double>(received.bytes() - received.bytes() / group_sizes_[static_cast<size_t>(group)]);
  price_.scattered_bytes += bytes;
  return aside(Stream::kNetwork, over(bytes, rates_.scatter_bytes));
}

ops::Event Priced::adamw(Buffer weight, Buffer master, Buffer m, Buffer, Buffer, Buffer, Buffer, const ops::UpdateRange& range) {
  // Gradient in; moments and master in and out; the weight out, and in where it is part of the master.
  const int64_t element = 4 + 4 * 4 + 2 * bytes_of(master.dtype) + (weight.id == master.id ? 0 : bytes_of(weight.dtype)) + (master.dtype == Dtype::kI16 ? bytes_of(weight.dtype) : 0);
  const double bytes = static_cast<double>(element * range.count);
  if (m.tier == ops::Tier::kHost) return aside(Stream::kHost, over(bytes, rates_.host_update_bytes));
  price_.moved_bytes += bytes;
  compute(over(bytes, rates_.device_bytes));
  return {};
}

}  // namespace uly::plan
