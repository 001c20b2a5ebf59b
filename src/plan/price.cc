#include "plan/price.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "base/check.h"
#include "base/shapes.h"

namespace uly::plan {

using ops::Buffer;
using ops::kPlaceAlignment;

Places place(const std::vector<Lifetime>& lives) {
  const size_t n = lives.size();
  std::vector<size_t> order(n);
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return lives[a].bytes > lives[b].bytes; });
  Places places;
  places.offset_bytes.assign(n, 0);
  places.bytes.resize(n);
  std::vector<size_t> placed;
  std::vector<std::pair<int64_t, int64_t>> busy;
  const auto end = [&](size_t i) { return lives[i].death < 0 ? std::numeric_limits<int64_t>::max() : lives[i].death; };
  for (const size_t i : order) {
    busy.clear();
    for (const size_t j : placed)
      if (lives[j].birth < end(i) && lives[i].birth < end(j)) busy.emplace_back(places.offset_bytes[j], places.offset_bytes[j] + round_up(lives[j].bytes, kPlaceAlignment));
    std::sort(busy.begin(), busy.end());
    int64_t at = 0;
    for (const auto& [from, to] : busy) {
      if (from - at >= lives[i].bytes) break;
      at = std::max(at, to);
    }
    places.offset_bytes[i] = at;
    places.bytes[i] = lives[i].bytes;
    places.arena_bytes = std::max(places.arena_bytes, at + round_up(lives[i].bytes, kPlaceAlignment));
    placed.push_back(i);
  }
  return places;
}

Priced::Priced(const std::array<int64_t, 2>& group_sizes, int64_t s, int64_t document_table_bytes) : group_sizes_(group_sizes) {
  for (Buffer& b : inputs_) b = make(s, 1, Dtype::kI64, ops::Kind::kInputs, "token ids, labels, positions", ops::Life::kStep, ops::Tier::kDevice);
  if (document_table_bytes > 0) make(1, document_table_bytes, Dtype::kU8, ops::Kind::kInputs, "table of documents", ops::Life::kStep, ops::Tier::kDevice);
}

Price Priced::price() const {
  const auto placed = [](const std::vector<Life>& lives) {
    std::vector<Lifetime> l;
    for (const Life& life : lives) l.push_back({life.bytes, life.birth, life.death});
    return place(l);
  };
  Price p = price_;
  p.run_places = placed(run_);
  p.step_places = placed(step_);
  return p;
}

Buffer Priced::make(int64_t rows, int64_t columns, Dtype dtype, ops::Kind kind, std::string_view, ops::Life life, ops::Tier tier) {
  std::vector<Life>& lives = life == ops::Life::kRun ? run_ : step_;
  Buffer b{.id = static_cast<int32_t>(lives.size()), .life = life, .tier = tier, .dtype = dtype, .offset = 0, .rows = rows, .columns = columns, .stride = columns};
  lives.push_back({.bytes = b.bytes(), .birth = clock_++, .death = -1});
  const int64_t bytes = round_up(b.bytes(), kPlaceAlignment);
  if (life == ops::Life::kRun) {
    price_.run_bytes += bytes;
    price_.run_by_kind[static_cast<size_t>(kind)] += bytes;
    return b;
  }
  kinds_.push_back(kind);
  live_ += bytes;
  live_by_kind_[static_cast<size_t>(kind)] += bytes;
  if (live_ > price_.peak_bytes) {
    price_.peak_bytes = live_;
    price_.peak_by_kind = live_by_kind_;
    price_.peak_where = layer_ < 0 ? where_ : fmt::format("{}, layer {}", where_, layer_);
  }
  return b;
}

void Priced::release(const Buffer& b) {
  ULY_CHECK(b.life == ops::Life::kStep, "only a step's buffers are released");
  Life& life = step_[static_cast<size_t>(b.id)];
  ULY_CHECK(life.death < 0, "a buffer was released twice");
  life.death = clock_++;
  const int64_t bytes = round_up(life.bytes, kPlaceAlignment);
  live_ -= bytes;
  live_by_kind_[static_cast<size_t>(kinds_[static_cast<size_t>(b.id)])] -= bytes;
}

Buffer Priced::input(ops::Input which) { return inputs_[static_cast<size_t>(which)]; }

void Priced::mark(std::string_view where, int64_t layer) {
  where_ = where;
  layer_ = layer;
}

void Priced::moved(std::initializer_list<Buffer> buffers) {
  for (const Buffer& b : buffers) price_.moved_bytes += static_cast<double>(b.bytes());
}

void Priced::attention(Buffer o_SnH, Buffer, Buffer, Buffer, const ops::Heads&, const ops::AttentionSchedule&) {
  price_.attention_flops += 2.0 * static_cast<double>(o_SnH.rows) * static_cast<double>(o_SnH.rows) * static_cast<double>(o_SnH.columns);
}

void Priced::attention_grad(Buffer, Buffer do_SnH, Buffer, Buffer, Buffer, Buffer, const ops::Heads&, const ops::AttentionSchedule&) {
  price_.attention_flops += 5.0 * static_cast<double>(do_SnH.rows) * static_cast<double>(do_SnH.rows) * static_cast<double>(do_SnH.columns);
}

double Priced::sent_bytes_total(const std::vector<int64_t>& elements, Dtype dtype) const {
  return static_cast<double>(std::accumulate(elements.begin(), elements.end(), int64_t{0})) * static_cast<double>(bytes_of(dtype));
}

ops::Event Priced::all_to_all(Buffer, Buffer send, ops::Group, const std::vector<int64_t>&, const std::vector<int64_t>& send_elements) {
  price_.exchanged_bytes += sent_bytes_total(send_elements, send.dtype);
  return {};
}

ops::Event Priced::all_gather(Buffer whole, Buffer shard, ops::Group) {
  price_.gathered_bytes += static_cast<double>(whole.bytes() - shard.bytes());
  return {};
}

ops::Event Priced::scatter(Buffer received, Buffer, ops::Group group) {
  price_.scattered_bytes += static_cast<double>(received.bytes() - received.bytes() / group_sizes_[static_cast<size_t>(group)]);
  return {};
}

void Priced::adamw(Buffer, Buffer, Buffer, Buffer, Buffer, Buffer, Buffer, const ops::UpdateRange& range) { price_.moved_bytes += 28.0 * static_cast<double>(range.count); }

}  // namespace uly::plan
