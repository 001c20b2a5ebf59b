#include "recipe/numbers.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <string_view>
#include <utility>

namespace uly::recipe {
namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }

std::string lowered_without_blanks_around(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c != '_') out += static_cast<char>(c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c);
  }
  const auto blank = [](char c) { return c == ' ' || (c >= '\t' && c <= '\r'); };
  out.erase(std::find_if_not(out.rbegin(), out.rend(), blank).base(), out.end());
  out.erase(out.begin(), std::find_if_not(out.begin(), out.end(), blank));
  return out;
}

// An optional minus, digits, and at most one decimal digit.
std::optional<double> short_number(std::string_view text) {
  size_t i = text.starts_with('-') ? 1 : 0;
  const size_t first = i;
  while (i < text.size() && is_digit(text[i])) ++i;
  if (i == first) return std::nullopt;
  if (i + 2 == text.size() && text[i] == '.' && is_digit(text[i + 1])) i += 2;
  if (i != text.size()) return std::nullopt;
  return plain_number(std::string(text));
}

std::optional<std::pair<double, double>> short_pair(std::string_view text, char between) {
  const size_t at = text.find(between);
  if (at == std::string_view::npos) return std::nullopt;
  const auto a = short_number(text.substr(0, at));
  const auto b = short_number(text.substr(at + 1));
  if (!a || !b) return std::nullopt;
  return std::pair(*a, *b);
}

struct Suffix {
  std::string_view text;
  double factor;
};
constexpr double kKi = 1024.0;
constexpr std::array kSuffixes = {
    Suffix{"ki", kKi}, Suffix{"mi", kKi* kKi}, Suffix{"gi", kKi* kKi* kKi}, Suffix{"ti", kKi* kKi* kKi* kKi}, Suffix{"k", 1e3}, Suffix{"m", 1e6},
    Suffix{"b", 1e9},  Suffix{"t", 1e12}};
constexpr std::array kByteUnits = {Suffix{"kib", kKi},
                                   Suffix{"mib", kKi* kKi},
                                   Suffix{"gib", kKi* kKi* kKi},
                                   Suffix{"tib", kKi* kKi* kKi* kKi},
                                   Suffix{"kb", 1e3},
                                   Suffix{"mb", 1e6},
                                   Suffix{"gb", 1e9},
                                   Suffix{"tb", 1e12},
                                   Suffix{"b", 1.0}};

std::optional<double> first_form(const std::string& text) {
  if (text.ends_with('%')) {
    const auto percent = plain_number(text.substr(0, text.size() - 1));
    return percent ? std::optional(*percent / 100.0) : std::nullopt;
  }
  if (const auto power = short_pair(text, '^')) return std::copysign(std::pow(std::fabs(power->first), power->second), power->first);
  if (const auto decimal = short_pair(text, 'e')) return decimal->first * std::pow(10.0, decimal->second);
  for (const Suffix& suffix : kSuffixes) {
    if (!text.ends_with(suffix.text)) continue;
    const auto number = short_number(std::string_view(text).substr(0, text.size() - suffix.text.size()));
    return number ? std::optional(*number * suffix.factor) : std::nullopt;
  }
  return plain_number(text);
}

}  // namespace

std::optional<double> plain_number(const std::string& text) {
  const size_t sign = text.starts_with('+') || text.starts_with('-') ? 1 : 0;
  if (sign >= text.size() || !(is_digit(text[sign]) || text[sign] == '.')) return std::nullopt;
  double value = 0;
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data() + sign, end, value);
  if (error != std::errc() || stop != end) return std::nullopt;
  return text[0] == '-' ? -value : value;
}

std::optional<double> human_number(const std::string& text) {
  const auto value = first_form(lowered_without_blanks_around(text));
  return value && std::isfinite(*value) ? value : std::nullopt;
}

std::optional<int64_t> bytes_from(const std::string& text) {
  std::string number = lowered_without_blanks_around(text);
  double factor = 1.0;
  for (const Suffix& unit : kByteUnits) {
    if (!number.ends_with(unit.text)) continue;
    number = lowered_without_blanks_around(number.substr(0, number.size() - unit.text.size()));
    factor = unit.factor;
    break;
  }
  const auto value = plain_number(number);
  if (!value) return std::nullopt;
  const auto bytes = whole(std::floor(*value * factor));
  return bytes && *bytes > 0 ? bytes : std::nullopt;
}

std::optional<int64_t> whole(double value) {
  if (!(std::fabs(value) < 9.2e18) || value != std::floor(value)) return std::nullopt;
  return static_cast<int64_t>(value);
}

}  // namespace uly::recipe
