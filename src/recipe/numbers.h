// Numbers as people write them in recipes.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace uly::recipe {

// Reads "500_000", "1.5k", "2^20", "5e8", "10%", "64Ki", "1.25e8". The first form that fits decides; the mantissa of
// "A^B", "AeB" and of a suffix has at most one decimal digit. Empty if no form fits or the number is not finite.
std::optional<double> human_number(const std::string& text);

// Reads "80GiB", "141 GB", "512": B, and K M G T with "B" (powers of 1000) or "iB" (powers of 1024). Empty if it is not
// a positive size.
std::optional<int64_t> bytes_from(const std::string& text);

// Reads what Python's float() reads, without underscores, infinities and NaN.
std::optional<double> plain_number(const std::string& text);

// Returns `value` as an integer if it is one that int64_t holds.
std::optional<int64_t> whole(double value);

}  // namespace uly::recipe
