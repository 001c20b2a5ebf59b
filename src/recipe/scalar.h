// What an unquoted YAML 1.1 scalar means, as PyYAML reads it.
#pragma once

#include <string>

#include "base/json.h"

namespace uly::recipe {

// Returns null, a boolean, an integer, a number or a string: `500_000` and `0x1F` are integers, `1.0e-5` is a number,
// `1e-5` (no dot) and `1.0e5` (no sign) are strings, `yes` and `off` are booleans, `1:30` is 90. An integer beyond 64
// bits becomes a number. Dates stay strings.
Json resolve_scalar(const std::string& text);

}  // namespace uly::recipe
