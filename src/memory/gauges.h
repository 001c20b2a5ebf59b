// What the process takes of the machine's memory.
#pragma once

#include <cstdint>

namespace uly::memory {

int64_t resident_bytes();       // now
int64_t peak_resident_bytes();  // at most, since the process began
int64_t group_peak_bytes();     // of its control group at most, file cache included; -1 where there is none or it does not say

}  // namespace uly::memory
