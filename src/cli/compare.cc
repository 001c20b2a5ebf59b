#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/units.h"
#include "cli/job.h"
#include "plan/reasons.h"

namespace uly::cli {
namespace {

// One key and the values that it is to take.
struct Axis {
  std::string key;
  std::vector<std::string> values;
};

// "data.max_length=32k,64k"; a comma within brackets or quotes separates nothing.
Axis axis_from(const std::string& text) {
  const size_t equals = text.find('=');
  ULY_USER_CHECK(equals != std::string::npos && equals > 0 && equals + 1 < text.size(), "--compare: expected KEY=V1,V2,..., found '{}'", text);
  Axis axis{.key = text.substr(0, equals), .values = {""}};
  int depth = 0;
  char quote = 0;
  for (const char c : text.substr(equals + 1)) {
    if (quote != 0) quote = c == quote ? 0 : quote;
    else if (c == '\'' || c == '"') quote = c;
    depth += (c == '[' || c == '{') - (c == ']' || c == '}');
    if (c == ',' && depth == 0 && quote == 0) axis.values.emplace_back();
    else axis.values.back() += c;
  }
  ULY_USER_CHECK(std::none_of(axis.values.begin(), axis.values.end(), [](const std::string& v) { return v.empty(); }), "--compare: expected a value between the commas of '{}'", text);
  return axis;
}

struct Row {
  std::vector<std::string> values;  // one an axis
  plan::Plan plan;
  std::string refused;              // why there is no plan
};

Row row_of(const Options& options, const std::vector<Axis>& axes, std::vector<std::string> values) {
  Row row{.values = std::move(values)};
  Options one = options;
  for (size_t i = 0; i < axes.size(); ++i) one.overrides.push_back(axes[i].key + "=" + row.values[i]);
  try {
    const Planned p = planned_for(one, false);
    row.plan = plan::make(p.recipe, find_model(p.recipe, Fetch::kNothing), p.machine, p.world, std::nullopt, {.longest = true});
  } catch (const UserError& e) {
    row.refused = e.what();
  }
  return row;
}

Json facts_of(const std::vector<Axis>& axes, const Row& row) {
  Json facts{{"set", Json::object()}};
  for (size_t i = 0; i < axes.size(); ++i) facts["set"][axes[i].key] = row.values[i];
  facts["refused"] = row.refused;
  if (!row.refused.empty()) return facts;
  const plan::Plan& p = row.plan;
  facts.update({{"fits", p.fits}, {"why_not", p.why_not}, {"states", p.states_words}, {"kept", plan::kept_words(p)}, {"device_bytes", plan::total_bytes(p)}, {"host_bytes", p.price.total_bytes(ops::Tier::kHost)}, {"disk_bytes", p.price.total_bytes(ops::Tier::kDisk)}});
  facts["time"] = p.facts.value("time", Json());
  facts["longest"] = p.facts["longest"];
  facts["max_length"] = p.max_length;
  facts["hash"] = p.hash;
  return facts;
}

std::vector<std::string> cells_of(const Row& row) {
  const plan::Plan& p = row.plan;
  const auto bytes = [&](int64_t n) { return n > 0 ? format_bytes(n) : "-"; };
  const bool timed = p.seconds > 0;
  const double tokens = static_cast<double>(p.planned_length * p.micro_batches) / static_cast<double>(p.mesh.P);
  return {p.fits ? "fits" : "does not fit", timed ? fmt::format("{:.2f}", p.seconds) : "-", timed ? fmt::format("{:.0f}", tokens / p.seconds) : "-", bytes(plan::total_bytes(p)), bytes(p.price.total_bytes(ops::Tier::kHost)), bytes(p.price.total_bytes(ops::Tier::kDisk)),
          p.longest && p.longest->max_length > 0 ? format_count(p.longest->max_length) : "-", p.fits ? plan::kept_words(p) : p.why_not};
}

// Columns as wide as they need; what follows the last is not padded.
void print_table(const std::vector<Axis>& axes, const std::vector<Row>& rows) {
  std::vector<std::vector<std::string>> table(1);
  for (const Axis& axis : axes) table[0].push_back(axis.key);
  for (const char* head : {"", "s a step", "tokens/s a rank", "device", "host", "disk", "longest", "kept"}) table[0].push_back(head);
  for (const Row& row : rows) {
    table.push_back(row.values);
    const std::vector<std::string> cells = row.refused.empty() ? cells_of(row) : std::vector<std::string>{"refused: " + row.refused};
    table.back().insert(table.back().end(), cells.begin(), cells.end());
  }
  std::vector<size_t> widths(table[0].size());
  for (const auto& cells : table)
    for (size_t i = 0; i + 1 < cells.size(); ++i) widths[i] = std::max(widths[i], cells[i].size());
  for (const auto& cells : table) {
    std::string line;
    for (size_t i = 0; i < cells.size(); ++i) {
      const bool last = i + 1 == cells.size(), right = i > axes.size() && !last;
      line += last ? cells[i] : right ? fmt::format("{:>{}}  ", cells[i], widths[i]) : fmt::format("{:<{}}  ", cells[i], widths[i]);
    }
    line.erase(line.find_last_not_of(' ') + 1);
    std::puts(line.c_str());
  }
}

}  // namespace

int compare(const Options& options) {
  ULY_USER_CHECK(!options.explain, "--compare: expected no --explain besides: it is for one plan");
  std::vector<Axis> axes;
  size_t count = 1;
  constexpr size_t kMost = 1000;
  for (const std::string& text : options.compare) {
    axes.push_back(axis_from(text));
    count *= axes.back().values.size();
    ULY_USER_CHECK(count <= kMost, "--compare: expected at most {} combinations", kMost);
  }
  std::vector<Row> rows;
  for (size_t n = 0; n < count; ++n) {
    // The last key's values change fastest.
    std::vector<std::string> values(axes.size());
    size_t rest = n;
    for (size_t i = axes.size(); i-- > 0; rest /= axes[i].values.size()) values[i] = axes[i].values[rest % axes[i].values.size()];
    rows.push_back(row_of(options, axes, std::move(values)));
  }
  ULY_USER_CHECK(std::any_of(rows.begin(), rows.end(), [](const Row& row) { return row.refused.empty(); }), "{}", rows.front().refused);
  if (options.json) {
    Json out = Json::array();
    for (const Row& row : rows) out.push_back(facts_of(axes, row));
    fmt::print("{}\n", out.dump(2));
  } else {
    print_table(axes, rows);
  }
  std::fflush(stdout);
  return 0;
}

}  // namespace uly::cli
