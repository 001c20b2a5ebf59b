#include "data/pack.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <utility>

#include "base/check.h"
#include "data/random.h"
#include "data/sampler.h"

namespace uly::data {
namespace {

using recipe::Overlong;
using recipe::PackStrategy;

// What shuffles and draws are told apart by.
constexpr uint64_t kShuffle = 0x7061636b, kFuse = 0x66757365, kSplit = 0x73706c69, kWeight = 0x77656967;

// A document on its way into a pack.
struct Placed {
  Piece piece;
  int64_t pack = 0;
};

// Documents in the given order, one pack open at a time. Returns the number of packs.
int64_t pack_in_order(std::vector<Placed>& documents, int64_t max_length) {
  int64_t pack = 0, open = 0;
  for (Placed& d : documents) {
    if (open > 0 && open + d.piece.count > max_length) ++pack, open = 0;
    d.pack = pack;
    open += d.piece.count;
  }
  return documents.empty() ? 0 : pack + 1;
}

// The same, but every pack has max_length tokens: whole packs are cut off a document that is longer, and what does not fit goes on in
// the next.
int64_t pack_exactly(std::vector<Placed>& documents, int64_t max_length, int64_t& num_cut) {
  std::vector<Placed> out;
  out.reserve(documents.size());
  std::vector<size_t> open;  // pieces of the open pack, which has `tokens`
  int64_t num_packs = 0, tokens = 0;
  const auto close = [&] {
    for (const size_t i : open) out[i].pack = num_packs;
    open.clear(), tokens = 0, ++num_packs;
  };
  for (const Placed& d : documents) {
    Piece rest = d.piece;
    const size_t before = out.size();
    const auto put = [&](int64_t count) {
      out.push_back({{rest.first, count}, num_packs});
      rest = {rest.first + count, rest.count - count};
    };
    for (; rest.count >= max_length; ++num_packs) put(max_length);
    while (rest.count > 0) {
      put(std::min(rest.count, max_length - tokens));
      open.push_back(out.size() - 1), tokens += out.back().piece.count;
      if (tokens == max_length) close();
    }
    num_cut += out.size() > before + 1;
  }
  if (!open.empty()) close();
  documents = std::move(out);
  return num_packs;
}

// Of every set of packs the one with least room that is enough: the packs by their room, as a tree of 64-bit words over the rooms that
// occur, and for each room a stack of packs.
class PacksByRoom {
 public:
  explicit PacksByRoom(int64_t max_room) : first_(static_cast<size_t>(max_room) + 1, -1) {
    for (size_t n = first_.size(); levels_.empty() || n > 1;) levels_.emplace_back(n = (n + 63) / 64, 0);
  }

  void put(int64_t pack, int64_t room) {
    if (static_cast<size_t>(pack) >= next_.size()) next_.resize(static_cast<size_t>(pack) + 1);
    int32_t& first = first_[static_cast<size_t>(room)];
    next_[static_cast<size_t>(pack)] = std::exchange(first, static_cast<int32_t>(pack));
    size_t at = static_cast<size_t>(room);
    for (auto& level : levels_) level[at / 64] |= uint64_t{1} << at % 64, at /= 64;
  }

  // Takes a pack with the least room of at least `wanted`; {-1, 0} where there is none.
  std::pair<int64_t, int64_t> take(int64_t wanted) {
    const int64_t room = find(static_cast<size_t>(wanted));
    if (room < 0) return {-1, 0};
    int32_t& first = first_[static_cast<size_t>(room)];
    const int64_t pack = first;
    first = next_[static_cast<size_t>(pack)];
    if (first < 0) erase(static_cast<size_t>(room));
    return {pack, room};
  }

 private:
  // The least room at or above `at` that occurs, or -1.
  int64_t find(size_t at) const {
    for (size_t l = 0; l < levels_.size(); ++l, at = at / 64 + 1) {
      if (at / 64 >= levels_[l].size()) return -1;
      const uint64_t word = levels_[l][at / 64] >> at % 64;
      if (word == 0) continue;
      at += static_cast<size_t>(std::countr_zero(word));
      while (l-- > 0) at = at * 64 + static_cast<size_t>(std::countr_zero(levels_[l][at]));
      return static_cast<int64_t>(at);
    }
    return -1;
  }

  void erase(size_t at) {
    for (auto& level : levels_) {
      level[at / 64] &= ~(uint64_t{1} << at % 64);
      if (level[at / 64] != 0) return;
      at /= 64;
    }
  }

  std::vector<int32_t> first_, next_;          // by room; by pack
  std::vector<std::vector<uint64_t>> levels_;  // rooms that occur; words that are not empty; ...
};

// Long documents first, longest before shorter, as only a pack that is nearly empty takes them; then the others in their order, so that
// packs mix lengths and cost about as much as each other. Each goes where it leaves least room.
int64_t pack_best_fit(std::vector<Placed>& documents, int64_t max_length) {
  constexpr int64_t kLong = 64;  // of so many parts of max_length one
  const auto first_short = std::stable_partition(documents.begin(), documents.end(), [&](const Placed& d) { return d.piece.count > max_length / kLong; });
  std::stable_sort(documents.begin(), first_short, [](const Placed& a, const Placed& b) { return a.piece.count > b.piece.count; });
  PacksByRoom packs(max_length);
  int64_t num_packs = 0;
  for (Placed& d : documents) {
    auto [pack, room] = packs.take(d.piece.count);
    if (pack < 0) pack = num_packs++, room = std::max(max_length, d.piece.count);  // one that is kept whole has a pack of its own
    d.pack = pack;
    if (room > d.piece.count) packs.put(pack, room - d.piece.count);
  }
  return num_packs;
}

// How often each of `samples` is taken.
std::vector<int64_t> times_taken(const TokenFile& file, const std::vector<int64_t>& samples, const std::vector<double>& weights, uint64_t seed) {
  ULY_CHECK(weights.size() == file.source_ends().size(), "a weight for every source of the token file");
  std::vector<int64_t> times(samples.size());
  size_t first = 0;
  for (size_t s = 0; s < weights.size(); ++s) {
    size_t last = first;
    while (last < samples.size() && samples[last] < file.source_ends()[s]) ++last;
    const int64_t n = static_cast<int64_t>(last - first), whole = static_cast<int64_t>(weights[s]), wanted = std::llround(weights[s] * static_cast<double>(n));
    std::vector<std::pair<uint64_t, size_t>> drawn;
    for (size_t i = first; i < last; ++i) times[i] = whole, drawn.emplace_back(hash(seed ^ kWeight, static_cast<uint64_t>(samples[i])), i);
    const auto end = drawn.begin() + (wanted - whole * n);
    std::nth_element(drawn.begin(), end, drawn.end());
    for (auto d = drawn.begin(); d != end; ++d) ++times[d->second];
    first = last;
  }
  return times;
}

PackRules rules(const recipe::Recipe& r, int64_t max_length) {
  return {.max_length = max_length, .overlong = r.data.overlong, .pack = r.data.pack_samples, .strategy = r.data.pack_strategy, .seed = static_cast<uint64_t>(r.data.seed)};
}

}  // namespace

PackRules rules_to_train(const recipe::Recipe& r, int64_t max_length) {
  PackRules out = rules(r, max_length);
  out.always_max_length = r.data.always_max_length, out.drop_last = r.data.drop_last, out.repeat = r.data.repeat_to_pack_max_length;
  out.fuse_prob = r.data.fuse_positions_prob;
  for (const recipe::Source& source : r.data.sources) out.weights.push_back(source.weight);
  if (std::all_of(out.weights.begin(), out.weights.end(), [](double w) { return w == 1; })) out.weights.clear();
  return out;
}

PackRules rules_to_evaluate(const recipe::Recipe& r, int64_t max_length) { return rules(r, max_length); }

double Packs::squared_lengths(int64_t pack) const {
  const double all = static_cast<double>(tokens(pack));
  if (fused(pack)) return all * all;
  double sum = 0;
  for (const Piece& p : pieces(pack)) sum += static_cast<double>(p.count) * static_cast<double>(p.count);
  return sum;
}

Packs make_packs(const TokenFile& file, const std::vector<int64_t>* samples, const PackRules& rules) {
  Packs packs;
  std::vector<Placed> documents;
  std::vector<int64_t> weighed;
  if (!rules.weights.empty()) {
    std::vector<int64_t> all(samples ? 0 : static_cast<size_t>(file.num_samples()));
    std::iota(all.begin(), all.end(), 0);
    const std::vector<int64_t>& from = samples ? *samples : all;
    const std::vector<int64_t> times = times_taken(file, from, rules.weights, rules.seed);
    for (size_t i = 0; i < from.size(); ++i) {
      if (times[i] == 0) packs.weighed_out.add(file.length(from[i]));
      for (int64_t t = 0; t < times[i]; ++t) {
        if (t > 0) packs.weighed_again.add(file.length(from[i]));
        weighed.push_back(from[i]);
      }
    }
    samples = &weighed;
  }
  const int64_t n = samples ? static_cast<int64_t>(samples->size()) : file.num_samples(), most = rules.max_length;
  documents.reserve(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    const int64_t sample = samples ? (*samples)[static_cast<size_t>(i)] : i;
    Piece p{file.start(sample), file.length(sample)};
    packs.longest_in_file = std::max(packs.longest_in_file, p.count);
    if (p.count == 0) continue;
    if (p.count > most && rules.overlong != Overlong::kKeep) {
      if (rules.overlong == Overlong::kDrop) {
        packs.dropped.add(p.count);
        continue;
      }
      if (rules.overlong == Overlong::kSplit) {
        // Where packs are cut to length all the same, that is where it is split.
        if (!(rules.pack && rules.always_max_length)) {
          packs.split.add(p.count);
          for (; p.count > most; p = {p.first + most, p.count - most}) documents.push_back({{p.first, most}});
        }
      } else {
        packs.truncated.add(p.count - most);
        if (rules.overlong == Overlong::kTruncateLeft) p.first += p.count - most;
        p.count = most;
      }
    }
    documents.push_back({p});
  }

  int64_t num_packs = static_cast<int64_t>(documents.size());
  if (rules.pack) {
    int64_t total = 0;
    for (const Placed& d : documents) total += d.piece.count;
    if (rules.repeat && total > 0)
      for (size_t i = 0; total + documents[i].piece.count <= most; ++i) {
        documents.push_back({documents[i].piece});
        packs.repeated.add(documents[i].piece.count), total += documents[i].piece.count;
      }
    std::vector<Placed> shuffled;
    shuffled.reserve(documents.size());
    for (const int64_t i : permutation(static_cast<int64_t>(documents.size()), rules.seed, kShuffle)) shuffled.push_back(documents[static_cast<size_t>(i)]);
    documents = std::move(shuffled);
    num_packs = rules.always_max_length ? pack_exactly(documents, most, packs.num_cut) : rules.strategy == PackStrategy::kBestFit ? pack_best_fit(documents, most) : pack_in_order(documents, most);
  } else {
    for (size_t i = 0; i < documents.size(); ++i) documents[i].pack = static_cast<int64_t>(i);
  }

  // Sorted by pack, in counting order.
  packs.tokens_.assign(static_cast<size_t>(num_packs), 0);
  packs.starts_.assign(static_cast<size_t>(num_packs) + 1, 0);
  for (const Placed& d : documents) packs.tokens_[static_cast<size_t>(d.pack)] += d.piece.count, ++packs.starts_[static_cast<size_t>(d.pack) + 1];
  std::partial_sum(packs.starts_.begin(), packs.starts_.end(), packs.starts_.begin());
  packs.pieces_.resize(documents.size());
  std::vector<int64_t> at(packs.starts_.begin(), packs.starts_.end() - 1);
  for (const Placed& d : documents) packs.pieces_[static_cast<size_t>(at[static_cast<size_t>(d.pack)]++)] = d.piece;

  if (rules.pack && rules.drop_last && num_packs > 0 && packs.tokens_.back() < most) {
    for (const Piece& p : packs.pieces(num_packs - 1)) packs.left_out.add(p.count);
    packs.starts_.pop_back(), packs.tokens_.pop_back(), --num_packs;
    packs.pieces_.resize(static_cast<size_t>(packs.starts_.back()));
  }
  if (rules.pack && rules.fuse_prob > 0) {
    for (int64_t i = 0; i < num_packs; ++i) {
      packs.fused_.push_back(static_cast<double>(hash(rules.seed ^ kFuse, static_cast<uint64_t>(i)) >> 11) * 0x1p-53 < rules.fuse_prob);
      packs.num_fused += packs.fused_.back();
    }
  }
  for (int64_t i = 0; i < num_packs; ++i) {
    packs.longest = std::max(packs.longest, packs.tokens(i));
    packs.num_tokens += packs.tokens(i);
    if (packs.fused(i)) packs.longest_document = std::max(packs.longest_document, packs.tokens(i));
  }
  for (const Piece& p : packs.pieces_) packs.longest_document = std::max(packs.longest_document, p.count);
  return packs;
}

Split split_samples(int64_t n, double share, uint64_t seed) {
  const int64_t wanted = std::llround(share * static_cast<double>(n));
  std::vector<std::pair<uint64_t, int64_t>> drawn;
  for (int64_t i = 0; i < n; ++i) drawn.emplace_back(hash(seed ^ kSplit, static_cast<uint64_t>(i)), i);
  std::nth_element(drawn.begin(), drawn.begin() + wanted, drawn.end());
  Split split;
  std::vector<char> is_eval(static_cast<size_t>(n));
  for (int64_t i = 0; i < wanted; ++i) is_eval[static_cast<size_t>(drawn[static_cast<size_t>(i)].second)] = 1;
  for (int64_t i = 0; i < n; ++i) (is_eval[static_cast<size_t>(i)] ? split.eval : split.train).push_back(i);
  return split;
}

}  // namespace uly::data
