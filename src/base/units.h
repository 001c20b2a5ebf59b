// Numbers as people read them.
#pragma once

#include <cstdint>
#include <string>

namespace uly {

std::string format_count(int64_t n);           // 1,234,567
std::string format_bytes(int64_t bytes);       // 512 B, 3.2 MiB, 71.9 GiB
std::string format_duration(double seconds);   // 12.3s, 4:05, 2:03:04, 1 day 2:03:04

}  // namespace uly
