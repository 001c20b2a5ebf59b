// Element types of tensors in memory and in safetensors files.
#pragma once

#include <cstdint>
#include <string>

namespace uly {

enum class Dtype : uint8_t { kF64, kF32, kBf16, kF16, kI64, kI32, kI16, kU8 };

int64_t bytes_of(Dtype dtype);

// Returns the name safetensors uses ("BF16", "F32", ...).
const char* name_of(Dtype dtype);

// Parses a safetensors name; throws UserError naming `where` for one that is not known.
Dtype dtype_from_name(const std::string& name, const std::string& where);

}  // namespace uly
