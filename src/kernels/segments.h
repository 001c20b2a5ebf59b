// The column ranges of an unpack, cut where any of them begins or ends.
#pragma once

#include <vector>

#include "kernels/exchange.h"

namespace uly::kernels {

struct Source {
  int64_t at = 0, stride = 0;  // in the packed buffer, of the segment's first column
};

// Columns [first, first + count) are the sum of sources[begin, end).
struct Segment {
  int64_t first = 0, count = 0;
  int64_t begin = 0, end = 0;
};

struct Segments {
  std::vector<Segment> segments;
  std::vector<Source> sources;
};

Segments segments_of(const PackArgs& a);

}  // namespace uly::kernels
