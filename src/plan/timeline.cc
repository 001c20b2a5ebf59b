#include "plan/timeline.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace uly::plan {
namespace {

constexpr size_t kColumns = 64;
constexpr size_t kNameColumns = 20;

}  // namespace

std::vector<Part> parts_of(const Price& price) {
  std::vector<Part> parts{{"forward"}};
  for (const Price::Mark& mark : price.marks) {
    const std::string& where = mark.where;
    const char* const name = where == "loss head" ? "loss" : where == "gradient norm" || where == "optimizer" ? "update" : parts.size() > 1 && parts.back().name == std::string("loss") ? "backward" : parts.back().name;
    if (name == std::string(parts.back().name)) continue;
    parts.back().end = mark.at;
    parts.push_back({name, mark.at});
  }
  parts.back().end = price.seconds;
  return parts;
}

std::vector<std::string> timeline(const Price& price) {
  std::vector<std::string> lines;
  if (price.seconds <= 0) return lines;
  const auto column = [&](double at) { return std::min(kColumns, static_cast<size_t>(std::lround(at / price.seconds * static_cast<double>(kColumns)))); };
  std::string head(kColumns, ' ');
  for (const Part& part : parts_of(price)) {
    const size_t from = column(part.begin), to = column(part.end);
    if (to <= from) continue;
    std::string text = fmt::format("|{} {:.2f} s", part.name, part.end - part.begin);
    if (text.size() > to - from) text = std::string("|") + part.name;
    head.replace(from, std::min(text.size(), to - from), text, 0, to - from);
  }
  lines.push_back(fmt::format("{:<{}} {} {:.2f} s", "", kNameColumns, head, price.seconds));
  for (size_t stream = 0; stream < kStreamNames.size(); ++stream) {
    if (price.busy[stream] <= 0) continue;
    std::array<double, kColumns> busy{};
    const double width = price.seconds / static_cast<double>(kColumns);
    for (const Price::Interval& one : price.intervals[stream])
      for (size_t c = static_cast<size_t>(one.begin / width); c < kColumns && static_cast<double>(c) * width < one.end; ++c)
        busy[c] += (std::min(one.end, static_cast<double>(c + 1) * width) - std::max(one.begin, static_cast<double>(c) * width)) / width;
    std::string bar;
    for (const double part : busy) bar += part > 0.9 ? '#' : part > 0.4 ? '+' : part > 0.01 ? '.' : ' ';
    bar.erase(bar.find_last_not_of(' ') + 1);
    lines.push_back(fmt::format("{:<{}} {}", kStreamNames[stream], kNameColumns, bar));
  }
  return lines;
}

Json timeline_facts(const Price& price) {
  Json parts = Json::array(), streams = Json::object();
  for (const Part& part : parts_of(price)) parts.push_back({{"name", part.name}, {"begin", part.begin}, {"end", part.end}});
  for (size_t stream = 0; stream < kStreamNames.size(); ++stream) streams[kStreamNames[stream]] = {{"busy", price.busy[stream]}, {"waited_for", price.waited[stream]}};
  return {{"parts", parts}, {"streams", streams}};
}

}  // namespace uly::plan
