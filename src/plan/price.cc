#include "plan/price.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "base/check.h"
#include "base/shapes.h"

namespace uly::plan {

using ops::Buffer;

Places place(const std::vector<Lifetime>& lives) {
  const size_t n = lives.size();
  std::vector<size_t> order(n);
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return lives[a].bytes > lives[b].bytes; });
  Places places;
  places.offset_bytes.assign(n, 0);
  places.bytes.resize(n);
  std::array<std::vector<size_t>, ops::kNumTiers> placed;
  std::vector<std::pair<int64_t, int64_t>> busy;
  const auto end = [&](size_t i) { return lives[i].death < 0 ? std::numeric_limits<int64_t>::max() : lives[i].death; };
  for (const size_t i : order) {
    const size_t tier = static_cast<size_t>(lives[i].tier);
    const auto taken = [&](size_t j) { return round_up(lives[j].bytes, ops::place_alignment(lives[j].tier)); };
    busy.clear();
    for (const size_t j : placed[tier])
      if (lives[j].birth < end(i) && lives[i].birth < end(j)) busy.emplace_back(places.offset_bytes[j], places.offset_bytes[j] + taken(j));
    std::sort(busy.begin(), busy.end());
    int64_t at = 0;
    for (const auto& [from, to] : busy) {
      if (from - at >= lives[i].bytes) break;
      at = std::max(at, to);
    }
    places.offset_bytes[i] = at;
    places.bytes[i] = lives[i].bytes;
    places.arena_bytes[tier] = std::max(places.arena_bytes[tier], at + taken(i));
    placed[tier].push_back(i);
  }
  return places;
}

Priced::Priced(const std::array<int64_t, 2>& group_sizes, int64_t s, int64_t document_table_bytes, const Rates& rates) : group_sizes_(group_sizes), rates_(rates) {
  for (Buffer& b : inputs_) b = make(s, 1, Dtype::kI64, ops::Kind::kInputs, "token ids, labels, positions", ops::Life::kStep, ops::Tier::kDevice);
  if (document_table_bytes > 0) make(1, document_table_bytes, Dtype::kU8, ops::Kind::kInputs, "table of documents", ops::Life::kStep, ops::Tier::kDevice);
}

Price Priced::price() const {
  Price p = price_;
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
    price.peak_where = layer_ < 0 ? where_ : fmt::format("{}, layer {}", where_, layer_);
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
}

namespace {

double over(double amount, double rate) { return rate > 0 ? amount / rate : 0; }

}  // namespace

void Priced::compute(double seconds) {
  free_at_[0] += seconds;
  price_.busy[0] += seconds;
  price_.seconds = std::max(price_.seconds, free_at_[0]);
}

ops::Event Priced::aside(Stream stream, double seconds) {
  double& free_at = free_at_[static_cast<size_t>(stream)];
  free_at = std::max(free_at, free_at_[0]) + seconds;
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
  price_.moved_bytes += bytes;
  compute(over(bytes, rates_.device_bytes));
}

void Priced::gemm(int64_t m, int64_t n, int64_t k) {
  const double flops = 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
  price_.gemm_flops += flops;
  compute(over(flops, rates_.gemm_flops));
}

ops::Event Priced::move(Buffer y, Buffer x) {
  ULY_CHECK(y.tier != x.tier && y.bytes() == x.bytes() && y.contiguous() && x.contiguous(), "a move is between tiers");
  const double bytes = static_cast<double>(x.bytes());
  if (y.tier == ops::Tier::kDisk || x.tier == ops::Tier::kDisk) return aside(Stream::kDisk, over(bytes, rates_.disk_bytes));
  if (y.tier == ops::Tier::kHost) return aside(Stream::kToHost, over(bytes, rates_.to_host_bytes));
  return aside(Stream::kToDevice, over(bytes, rates_.to_device_bytes));
}

void Priced::attention(Buffer o_SnH, Buffer, Buffer, Buffer, const ops::Heads&, const ops::AttentionSchedule&) {
  const double flops = 2.0 * static_cast<double>(o_SnH.rows) * static_cast<double>(o_SnH.rows) * static_cast<double>(o_SnH.columns);
  price_.attention_flops += flops;
  compute(over(flops, rates_.attention_forward_flops));
}

void Priced::attention_grad(Buffer, Buffer do_SnH, Buffer, Buffer, Buffer, Buffer, const ops::Heads&, const ops::AttentionSchedule&) {
  const double flops = 5.0 * static_cast<double>(do_SnH.rows) * static_cast<double>(do_SnH.rows) * static_cast<double>(do_SnH.columns);
  price_.attention_flops += flops;
  compute(over(flops, rates_.attention_backward_flops));
}

double Priced::sent_bytes_total(const std::vector<int64_t>& elements, Dtype dtype) const {
  return static_cast<double>(std::accumulate(elements.begin(), elements.end(), int64_t{0})) * static_cast<double>(bytes_of(dtype));
}

ops::Event Priced::sent(double bytes, ops::Group group) { return aside(Stream::kNetwork, over(bytes, group == ops::Group::kWorld ? rates_.world_bytes : rates_.sequence_bytes)); }

ops::Event Priced::all_to_all(Buffer, Buffer send, ops::Group group, const std::vector<int64_t>&, const std::vector<int64_t>& send_elements) {
  const double bytes = sent_bytes_total(send_elements, send.dtype);
  price_.exchanged_bytes += bytes;
  return sent(bytes, group);
}

ops::Event Priced::all_gather(Buffer whole, Buffer shard, ops::Group group) {
  const double bytes = static_cast<double>(whole.bytes() - shard.bytes());
  price_.gathered_bytes += bytes;
  return sent(bytes, group);
}

ops::Event Priced::scatter(Buffer received, Buffer, ops::Group group) {
  const double bytes = static_cast<double>(received.bytes() - received.bytes() / group_sizes_[static_cast<size_t>(group)]);
  price_.scattered_bytes += bytes;
  return sent(bytes, group);
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
