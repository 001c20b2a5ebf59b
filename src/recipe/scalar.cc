#include "recipe/scalar.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdint>
#include <limits>
#include <optional>
#include <string_view>

#include "recipe/numbers.h"

namespace uly::recipe {
namespace {

// Moves over a text as a regular expression would.
struct Cursor {
  std::string_view text;
  size_t at = 0;

  bool done() const { return at == text.size(); }
  bool take(std::string_view any_of) {
    if (done() || any_of.find(text[at]) == std::string_view::npos) return false;
    ++at;
    return true;
  }
  size_t take_all(std::string_view any_of) {
    const size_t start = at;
    while (take(any_of)) {
    }
    return at - start;
  }
  bool take_word(std::string_view word) {
    if (text.substr(at, word.size()) != word) return false;
    at += word.size();
    return true;
  }
};

constexpr std::string_view kDigits = "0123456789";
constexpr std::string_view kDigitsOrGap = "0123456789_";

// (?::[0-5]?[0-9])+
bool take_sixties(Cursor& c) {
  size_t count = 0;
  while (c.take(":")) {
    const size_t start = c.at;
    if (c.take_all(kDigits) == 0 || c.at - start > 2 || (c.at - start == 2 && c.text[start] > '5')) return false;
    ++count;
  }
  return count > 0;
}

// (?:[eE][-+][0-9]+)?
bool take_exponent(Cursor& c) {
  if (!c.take("eE")) return true;
  return c.take("-+") && c.take_all(kDigits) > 0;
}

enum class Form { kNone, kDecimal, kSixties, kInfinite, kNan, kBinary, kOctal, kHex };

Form float_form(std::string_view text) {
  if (text == ".nan" || text == ".NaN" || text == ".NAN") return Form::kNan;
  Cursor c{text};
  const bool sign = c.take("-+");
  if (c.take(".")) {
    if (c.take_word("inf") || c.take_word("Inf") || c.take_word("INF")) return c.done() ? Form::kInfinite : Form::kNone;
    return !sign && c.take(kDigits) && (c.take_all(kDigitsOrGap), take_exponent(c)) && c.done() ? Form::kDecimal : Form::kNone;
  }
  if (!c.take(kDigits)) return Form::kNone;
  c.take_all(kDigitsOrGap);
  Cursor sixties = c;
  if (take_sixties(sixties)) return sixties.take(".") && (sixties.take_all(kDigitsOrGap), sixties.done()) ? Form::kSixties : Form::kNone;
  return c.take(".") && (c.take_all(kDigitsOrGap), take_exponent(c)) && c.done() ? Form::kDecimal : Form::kNone;
}

Form int_form(std::string_view text) {
  Cursor c{text};
  c.take("-+");
  if (c.take("0")) {
    if (c.done()) return Form::kDecimal;
    if (c.take("b")) return c.take_all("01_") > 0 && c.done() ? Form::kBinary : Form::kNone;
    if (c.take("x")) return c.take_all("0123456789abcdefABCDEF_") > 0 && c.done() ? Form::kHex : Form::kNone;
    return c.take_all("01234567_") > 0 && c.done() ? Form::kOctal : Form::kNone;
  }
  if (!c.take(kDigits)) return Form::kNone;
  c.take_all(kDigitsOrGap);
  if (c.done()) return Form::kDecimal;
  return take_sixties(c) && c.done() ? Form::kSixties : Form::kNone;
}

struct Signed {
  double sign;
  std::string digits;  // without sign and gaps
};

Signed split_sign(const std::string& text) {
  Signed out{text[0] == '-' ? -1.0 : 1.0, text.substr(text[0] == '-' || text[0] == '+' ? 1 : 0)};
  std::erase(out.digits, '_');
  return out;
}

double sixties_value(const std::string& digits) {
  double value = 0;
  size_t start = 0;
  while (start <= digits.size()) {
    const size_t end = std::min(digits.find(':', start), digits.size());
    value = value * 60 + plain_number(digits.substr(start, end - start)).value_or(0);
    start = end + 1;
  }
  return value;
}

Json float_value(const std::string& text, Form form) {
  const auto [sign, digits] = split_sign(text);
  if (form == Form::kNan) return std::numeric_limits<double>::quiet_NaN();
  if (form == Form::kInfinite) return sign * std::numeric_limits<double>::infinity();
  if (form == Form::kSixties) return sign * sixties_value(digits);
  const auto value = plain_number(digits);
  return value ? Json(sign * *value) : Json(sign * std::numeric_limits<double>::infinity());
}

std::optional<Json> int_value(const std::string& text, Form form) {
  const auto [sign, all] = split_sign(text);
  if (form == Form::kSixties) {
    const double value = sign * sixties_value(all);
    return whole(value) ? Json(*whole(value)) : Json(value);
  }
  const int base = form == Form::kBinary ? 2 : form == Form::kHex ? 16 : form == Form::kOctal ? 8 : 10;
  const std::string digits = form == Form::kBinary || form == Form::kHex ? all.substr(2) : all;
  if (digits.empty()) return std::nullopt;
  int64_t value = 0;
  const std::string with_sign = (sign < 0 ? "-" : "") + digits;
  const auto [stop, error] = std::from_chars(with_sign.data(), with_sign.data() + with_sign.size(), value, base);
  if (error == std::errc()) return Json(value);
  if (base == 10) return Json(sign * plain_number(digits).value_or(std::numeric_limits<double>::infinity()));
  double large = 0;
  for (const char c : digits) large = large * base + (c <= '9' ? c - '0' : (c | 0x20) - 'a' + 10);
  return Json(sign * large);
}

template <size_t N>
bool among(std::string_view text, const std::array<std::string_view, N>& words) {
  return std::find(words.begin(), words.end(), text) != words.end();
}

constexpr std::array<std::string_view, 9> kTrue = {"yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON"};
constexpr std::array<std::string_view, 9> kFalse = {"no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF"};
constexpr std::array<std::string_view, 5> kNull = {"", "~", "null", "Null", "NULL"};

}  // namespace

Json resolve_scalar(const std::string& text) {
  if (among(text, kNull)) return nullptr;
  if (among(text, kTrue)) return true;
  if (among(text, kFalse)) return false;
  if (const Form form = float_form(text); form != Form::kNone) return float_value(text, form);
  if (const Form form = int_form(text); form != Form::kNone) {
    if (auto value = int_value(text, form)) return *value;
  }
  return text;
}

}  // namespace uly::recipe
