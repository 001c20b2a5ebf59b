// What the process takes of the machine's memory.
#pragma once

#include <cstdint>

namespace uly::memory {

int64_t resident_bytes();       // now
int64_t peak_resident_bytes();  // at most, since the process began

}  // namespace uly::memory
