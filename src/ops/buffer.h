// A buffer: a matrix of rows x columns somewhere. A value that names memory and does not own it.
#pragma once

#include <cstdint>

#include "base/dtype.h"

namespace uly::ops {

// Where bytes lie. On the CPU the device is host memory too, with a budget of its own.
enum class Tier : uint8_t { kDevice, kHost, kDisk };
inline constexpr int kNumTiers = 3;
const char* name_of(Tier tier);

// kRun lives as long as the process (weights, optimizer states); kStep within one program, placed by the pricing run.
enum class Life : uint8_t { kRun, kStep };

// What bytes are for: the rows of the plan's table.
enum class Kind : uint8_t { kWeights, kGradients, kOptimizer, kInputs, kSaved, kActivations, kCommunication };
inline constexpr int kNumKinds = 7;
const char* name_of(Kind kind);

struct Buffer {
  int32_t id = -1;       // the allocation it lies in; -1: no buffer
  Life life = Life::kStep;
  Tier tier = Tier::kDevice;
  Dtype dtype = Dtype::kF32;
  int64_t offset = 0;    // elements from the allocation's start
  int64_t rows = 0, columns = 0;
  int64_t stride = 0;    // elements from one row to the next, >= columns

  bool exists() const { return id >= 0; }
  bool contiguous() const { return stride == columns || rows <= 1; }
  int64_t elements() const { return rows * columns; }
  int64_t bytes() const { return elements() * bytes_of(dtype); }

  // Returns rows [first, first + count).
  Buffer row_range(int64_t first, int64_t count) const {
    Buffer b = *this;
    b.offset += first * stride;
    b.rows = count;
    return b;
  }
  // Returns columns [first, first + count).
  Buffer column_range(int64_t first, int64_t count) const {
    Buffer b = *this;
    b.offset += first;
    b.columns = count;
    return b;
  }
  // Returns `rows` x `columns` contiguous elements from element `first` on, of a contiguous buffer.
  Buffer view(int64_t first, int64_t new_rows, int64_t new_columns) const {
    Buffer b = *this;
    b.offset += first;
    b.rows = new_rows;
    b.columns = b.stride = new_columns;
    return b;
  }
};

}  // namespace uly::ops
