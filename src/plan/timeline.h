// What runs when within a step: for each stream a bar over the step's time.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "base/json.h"
#include "plan/price.h"

namespace uly::plan {

inline constexpr std::array<const char*, kNumStreams> kStreamNames = {"compute", "to the host", "to the device", "disk", "updates on the host", "between ranks"};

// Spans of a step: forward, loss, backward, and what comes after.
struct Part {
  const char* name;
  double begin = 0, end = 0;
};
std::vector<Part> parts_of(const Price& price);

// Of a price with its times recorded: a line of the parts, then one for each stream that is busy. In a bar `#` is a stretch that is
// busy all the time, `+` half of it, `.` less, a blank one that idles.
std::vector<std::string> timeline(const Price& price);

Json timeline_facts(const Price& price);

}  // namespace uly::plan
