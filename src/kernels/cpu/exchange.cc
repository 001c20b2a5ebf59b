#include "kernels/exchange.h"

#include <algorithm>
#include <cstring>

#include "kernels/access.h"
#include "kernels/cpu/clones.h"
#include "kernels/segments.h"

namespace uly::kernels {

Segments segments_of(const PackArgs& a) {
  std::vector<int64_t> cuts;
  for (int64_t r = 0; r < a.num_ranges; ++r) {
    cuts.push_back(a.ranges[r].first);
    cuts.push_back(a.ranges[r].first + a.ranges[r].count);
  }
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  Segments out;
  for (size_t c = 0; c + 1 < cuts.size(); ++c) {
    Segment segment{.first = cuts[c], .count = cuts[c + 1] - cuts[c], .begin = static_cast<int64_t>(out.sources.size()), .end = 0};
    for (int64_t r = 0; r < a.num_ranges; ++r) {
      const PackedColumns& range = a.ranges[r];
      if (range.first <= segment.first && segment.first < range.first + range.count)
        out.sources.push_back({.at = range.at + segment.first - range.first, .stride = range.stride});
    }
    segment.end = static_cast<int64_t>(out.sources.size());
    if (segment.end > segment.begin) out.segments.push_back(segment);
  }
  return out;
}

namespace cpu {
namespace {

constexpr int64_t kStrip = 512;

ULY_CLONES void sum_sources(const PackArgs& a, const Segment& segment, const Source* sources, int64_t row) {
  for_float_type(a.x.dtype, "unpack_columns", [&](auto t) ULY_INLINE_LAMBDA {
    using T = decltype(t);
    const T* packed = static_cast<const T*>(a.packed);
    for (int64_t first = 0; first < segment.count; first += kStrip) {
      const int64_t count = std::min(kStrip, segment.count - first);
      float sum[kStrip] = {};
      for (int64_t s = segment.begin; s < segment.end; ++s) {
        const T* from = packed + sources[s].at + row * sources[s].stride + first;
        for (int64_t j = 0; j < count; ++j) sum[j] += to_float(from[j]);
      }
      T* to = row_of<T>(a.x, row) + segment.first + first;
      for (int64_t j = 0; j < count; ++j) to[j] = from_float<T>(sum[j]);
    }
  });
}

}  // namespace

void pack_columns(const PackArgs& a, int64_t begin, int64_t end) {
  const int64_t bytes = bytes_of(a.x.dtype);
  for (int64_t r = 0; r < a.num_ranges; ++r) {
    const PackedColumns& range = a.ranges[r];
    for (int64_t i = begin; i < end; ++i)
      std::memcpy(static_cast<char*>(a.packed) + (range.at + i * range.stride) * bytes,
                  static_cast<const char*>(a.x.data) + (i * a.x.stride + range.first) * bytes, static_cast<size_t>(range.count * bytes));
  }
}

void unpack_columns(const PackArgs& a, int64_t begin, int64_t end) {
  const Segments all = segments_of(a);
  const int64_t bytes = bytes_of(a.x.dtype);
  for (const Segment& segment : all.segments)
    for (int64_t i = begin; i < end; ++i) {
      if (segment.end - segment.begin > 1) {
        sum_sources(a, segment, all.sources.data(), i);
        continue;
      }
      const Source& source = all.sources[static_cast<size_t>(segment.begin)];
      std::memcpy(static_cast<char*>(a.x.data) + (i * a.x.stride + segment.first) * bytes,
                  static_cast<const char*>(a.packed) + (source.at + i * source.stride) * bytes, static_cast<size_t>(segment.count * bytes));
    }
}

ULY_CLONES void sum_pieces(const SumPiecesArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t kPiece = 4096;  // elements of the shard that stay in the first cache over all pieces
  const int64_t n = a.shard.elements();
  float* shard = static_cast<float*>(a.shard.data);
  for_float_type(a.received.dtype, "sum_pieces", [&](auto t) ULY_INLINE_LAMBDA {
    using T = decltype(t);
    const T* received = static_cast<const T*>(a.received.data);
    for (int64_t first = begin; first < end; first += kPiece) {
      const int64_t last = std::min(end, first + kPiece);
      for (int64_t p = 0; p < a.pieces; ++p) {
        const T* piece = received + p * n;
        ULY_LANES
        for (int64_t j = first; j < last; ++j) shard[j] += to_float(piece[j]);
      }
    }
  });
}

}  // namespace cpu
}  // namespace uly::kernels
