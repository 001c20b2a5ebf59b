#include "base/dtype.h"

#include <array>

#include "base/check.h"

namespace uly {
namespace {

struct Row {
  Dtype dtype;
  const char* name;
  int64_t bytes;
};
constexpr std::array<Row, 8> kRows = {{{Dtype::kF64, "F64", 8},
                                       {Dtype::kF32, "F32", 4},
                                       {Dtype::kBf16, "BF16", 2},
                                       {Dtype::kF16, "F16", 2},
                                       {Dtype::kI64, "I64", 8},
                                       {Dtype::kI32, "I32", 4},
                                       {Dtype::kI16, "I16", 2},
                                       {Dtype::kU8, "U8", 1}}};

}  // namespace

int64_t bytes_of(Dtype dtype) { return kRows[static_cast<size_t>(dtype)].bytes; }

const char* name_of(Dtype dtype) { return kRows[static_cast<size_t>(dtype)].name; }

Dtype dtype_from_name(const std::string& name, const std::string& where) {
  for (const Row& row : kRows)
    if (name == row.name) return row.dtype;
  user_error("{}: expected a dtype among F64, F32, BF16, F16, I64, I32, I16, U8, found {}", where, name);
}

}  // namespace uly
