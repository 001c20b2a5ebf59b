#include "recipe/convert.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/check.h"
#include "recipe/numbers.h"

namespace uly::recipe {
namespace {

bool is_human(Kind kind) { return kind == Kind::kHumanInt || kind == Kind::kHumanNumber; }

std::optional<double> number_of(const Node& node, bool human) {
  if (node.kind != Node::Kind::kScalar) return std::nullopt;
  if (node.scalar.is_number()) return node.scalar.get<double>();
  if (!node.scalar.is_string()) return std::nullopt;
  return human ? human_number(node.text) : plain_number(node.text);
}

bool within(const Field& field, double value) { return std::isfinite(value) && value >= field.min && value <= field.max && value < field.below; }

std::optional<Json> integer(const Field& field, const Node& node) {
  if (node.scalar.is_number_integer()) return within(field, node.scalar.get<double>()) ? std::optional(node.scalar) : std::nullopt;
  const auto number = number_of(node, is_human(field.kind));
  const auto value = number ? whole(*number) : std::nullopt;
  return value && within(field, *number) ? std::optional(Json(*value)) : std::nullopt;
}

std::optional<Json> number(const Field& field, const Node& node) {
  const auto value = number_of(node, is_human(field.kind));
  return value && within(field, *value) ? std::optional(Json(*value)) : std::nullopt;
}

std::optional<Json> boolean(const Node& node) {
  if (node.scalar.is_boolean()) return node.scalar;
  if (node.scalar == 1 || node.scalar == 0) return node.scalar == 1;
  if (node.text == "true" || node.text == "yes" || node.text == "on") return true;
  if (node.text == "false" || node.text == "no" || node.text == "off") return false;
  return std::nullopt;
}

std::optional<Json> numbers(const Field& field, const Node& node) {
  if (node.kind != Node::Kind::kList || node.items.size() != field.count) return std::nullopt;
  Json out = Json::array();
  for (const NodePtr& item : node.items) {
    const auto value = number_of(*item, false);
    if (!value || !within(field, *value)) return std::nullopt;
    out.push_back(*value);
  }
  return out;
}

std::optional<Json> ranks(const Node& node) {
  if (node.kind == Node::Kind::kScalar) return node.text == "*" ? std::optional(node.scalar) : std::nullopt;
  const bool integers =
      node.kind == Node::Kind::kList && std::all_of(node.items.begin(), node.items.end(), [](const NodePtr& item) { return item->scalar.is_number_integer(); });
  return integers ? std::optional(to_json(node)) : std::nullopt;
}

bool all_finite(const Json& value) {
  if (value.is_number_float()) return std::isfinite(value.get<double>());
  return std::all_of(value.begin(), value.end(),
                     [](const Json& item) { return !item.is_structured() ? !item.is_number_float() || std::isfinite(item.get<double>()) : all_finite(item); });
}

std::optional<Json> finite(const Json& value) { return all_finite(value) ? std::optional(value) : std::nullopt; }

std::optional<Json> convert_kind(const Field& field, const Node& node) {
  const bool scalar = node.kind == Node::Kind::kScalar;
  switch (field.kind) {
    case Kind::kBool:
      return scalar ? boolean(node) : std::nullopt;
    case Kind::kInt:
    case Kind::kHumanInt:
      return scalar ? integer(field, node) : std::nullopt;
    case Kind::kNumber:
    case Kind::kHumanNumber:
      return number(field, node);
    case Kind::kText:
      return scalar && node.scalar.is_string() && !node.text.empty() ? std::optional(node.scalar) : std::nullopt;
    case Kind::kBytes:
      return scalar && bytes_from(node.text) ? std::optional(Json(node.text)) : std::nullopt;
    case Kind::kNumbers:
      return numbers(field, node);
    case Kind::kRanks:
      return ranks(node);
    case Kind::kFree:
      return node.kind == Node::Kind::kMapping ? finite(to_json(node)) : std::nullopt;
    case Kind::kAny:
      return finite(to_json(node));
    case Kind::kSection:
    case Kind::kSections:
      break;
  }
  ULY_CHECK(false, "a section is no single value");
  return std::nullopt;
}

std::string bounds(const Field& field) {
  if (std::isfinite(field.below)) return fmt::format(" >= {} and < {}", field.min, field.below);
  if (std::isfinite(field.min) && std::isfinite(field.max)) return fmt::format(" from {} to {}", field.min, field.max);
  return std::isfinite(field.min) ? fmt::format(" >= {}", field.min) : "";
}

std::string text_of(const Json& value) { return value.is_string() ? value.get<std::string>() : value.dump(); }

// Counts insertions, deletions, replacements and swaps of neighbours that turn a into b.
size_t edits(const std::string& a, const std::string& b) {
  std::vector<std::vector<size_t>> d(a.size() + 1, std::vector<size_t>(b.size() + 1));
  for (size_t i = 0; i <= a.size(); ++i) {
    for (size_t j = 0; j <= b.size(); ++j) {
      if (i == 0 || j == 0) {
        d[i][j] = i + j;
        continue;
      }
      d[i][j] = std::min({d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1)});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
    }
  }
  return d[a.size()][b.size()];
}

}  // namespace

const Choice* choice_of(const Field& field, const Json& value) {
  for (const Choice& choice : field.choices) {
    if (choice.value == text_of(value)) return &choice;
  }
  return nullptr;
}

std::optional<Json> convert(const Field& field, const Node& node) {
  if (node.is_null() && field.initial == "null") return Json(nullptr);
  if (!field.word.empty() && node.kind == Node::Kind::kScalar && node.text == field.word) return Json(field.word);
  const auto value = convert_kind(field, node);
  if (!value || field.choices.empty() || field.decision != Decision::kWorks) return value;
  const Choice* choice = choice_of(field, *value);
  if (choice == nullptr) return std::nullopt;
  return choice->means.empty() ? value : std::optional(Json(choice->means));
}

std::string expectation(const Field& field) {
  if (!field.choices.empty() && field.decision == Decision::kWorks) {
    std::string out;
    size_t count = 0;
    for (const Choice& choice : field.choices) {
      if (choice.decision == Decision::kRefused || !choice.means.empty()) continue;
      out += (count++ == 0 ? "'" : ", '") + choice.value + "'";
    }
    if (count > 1) out = "one of " + out;
    return out;
  }
  switch (field.kind) {
    case Kind::kBool:
      return "true or false";
    case Kind::kInt:
    case Kind::kHumanInt:
      return "an integer" + bounds(field) + (field.word.empty() ? "" : " or " + field.word);
    case Kind::kNumber:
    case Kind::kHumanNumber:
      return "a number" + bounds(field);
    case Kind::kText:
      return "text";
    case Kind::kBytes:
      return "a size such as 80GiB";
    case Kind::kNumbers:
      return fmt::format("a list of {} numbers{}", field.count, bounds(field));
    case Kind::kRanks:
      return "'*' or a list of integers";
    case Kind::kFree:
      return "a mapping of finite values";
    case Kind::kAny:
      return "finite values";
    case Kind::kSection:
      return "a mapping";
    case Kind::kSections:
      return "a list of mappings";
  }
  return "";
}

Json default_of(const Field& field) {
  const NodePtr node = read_yaml(field.initial, "default of " + field.name, false);
  const auto value = field.kind == Kind::kSection || field.kind == Kind::kSections ? std::optional(to_json(*node)) : convert(field, *node);
  ULY_CHECK(value.has_value(), "default of " + field.name);
  return *value;
}

std::string nearest(const std::string& word, const std::vector<std::string>& candidates) {
  constexpr size_t kLongest = 100;
  if (word.size() > kLongest) return "";
  std::string best;
  size_t fewest = std::min<size_t>(3, word.size() / 3) + 1;
  for (const std::string& candidate : candidates) {
    const size_t count = edits(word, candidate);
    if (count < fewest) {
      fewest = count;
      best = candidate;
    }
  }
  return best;
}

}  // namespace uly::recipe
