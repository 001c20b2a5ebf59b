// The instruction set of a training step.
//
// A step is written once (step/) against this interface and read by two interpreters: plan::Priced counts its bytes and
// seconds and places its buffers, engine::Engine runs it. An instruction names its buffers; outputs come first; nothing
// here allocates by itself. What differs from sample to sample (token ids, labels, document starts, scales, learning
// rate) is data, which the engine holds, and no part of the program.
//
// Conventions: weights are out-by-in. A weight gradient is fp32 and +=, but for linear_dw, which is told; an input gradient
// is written, except where the name says add. Letters: base/shapes.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string_view>
#include <vector>

#include "base/dtype.h"
#include "ops/attention.h"
#include "ops/buffer.h"

namespace uly::ops {

enum class Group : uint8_t { kSequence, kWorld, kNode };  // kNode: ranks that share a second copy of the weights
inline constexpr int kNumGroups = 3;

// Something that an instruction will have done while others run: a collective, a move, an update on the host. It begins when
// all before it is done; until wait(event) what it reads may be read, and what it writes may not be touched. Waiting orders
// what follows; the launching thread need not stop for it.
struct Event {
  int32_t id = -1;
};

// The batch's tensors that the program reads; they lie in buffers that the engine fills before the program runs.
enum class Input : uint8_t { kIds_s, kLabels_s, kPositions_s };
inline constexpr int kNumInputs = 3;

// Columns [first, first + count) of a matrix; a rank's block in an exchange is a list of them.
struct Columns {
  int64_t first = 0, count = 0;
};
using ColumnBlocks = std::vector<std::vector<Columns>>;  // one list a rank of the sequence group

// A contiguous piece of a rank's shard of one unit with one rule for weight decay.
struct UpdateRange {
  int64_t first = 0, count = 0;  // elements within the shard
  bool decays = true;
};

class Ops {
 public:
  virtual ~Ops() = default;

  // --- memory. `what` is for people: it appears in the plan and in errors.
  virtual Buffer make(int64_t rows, int64_t columns, Dtype dtype, Kind kind, std::string_view what, Life life = Life::kStep, Tier tier = Tier::kDevice) = 0;
  virtual void release(const Buffer& b) = 0;
  virtual Buffer input(Input which) = 0;                                        // s x 1, i64
  virtual void zero(Buffer y) = 0;
  virtual void copy(Buffer y, Buffer x) = 0;                                    // casts where dtypes differ
  virtual Event move(Buffer y, Buffer x) = 0;                                   // contiguous, between tiers; the same bytes
  // A label for what follows, e.g. "layer 17 mlp backward": error messages and traces show it.
  virtual void mark(std::string_view where, int64_t layer) = 0;

  // --- linear maps; w_OI
  virtual void linear(Buffer y_tO, Buffer x_tI, Buffer w_OI) = 0;               // y  = x w'
  virtual void linear_add(Buffer y_tO, Buffer x_tI, Buffer w_OI, Buffer r_tO) = 0;  // y = r + x w'; r may be y
  virtual void linear_dx(Buffer dx_tI, Buffer dy_tO, Buffer w_OI) = 0;          // dx = dy w
  virtual void linear_dw(Buffer dw_OI, Buffer dy_tO, Buffer x_tI, bool add) = 0;  // dw = dy' x, or dw += dy' x
  virtual void add_bias(Buffer y_tO, Buffer b_O) = 0;                           // y += b
  virtual void bias_grad(Buffer db_O, Buffer dy_tO) = 0;                        // db += column sums

  // --- norms and rope
  virtual void rms_norm(Buffer y_sD, Buffer rstd_s, Buffer x_sD, Buffer w_D, double eps) = 0;
  virtual void rms_norm_grad(Buffer dx_sD, Buffer dw_D, Buffer dy_sD, Buffer x_sD, Buffer rstd_s, Buffer w_D) = 0;   // dx +=, dw +=
  // Norm over each head of H columns, then rope, in place; rstd has a column a head. raw, where it exists, gets x as it
  // was: the gradient needs both.
  virtual void norm_rope(Buffer x_snH, Buffer raw_snH, Buffer rstd_sn, Buffer w_H, Buffer table_sH, double eps) = 0;
  virtual void norm_rope_grad(Buffer dx_snH, Buffer dw_H, Buffer raw_snH, Buffer rstd_sn, Buffer w_H, Buffer table_sH) = 0;  // dx: dy in, dx out; dw +=
  virtual void rope_table(Buffer table_sH) = 0;                                 // cos | sin, H/2 columns each, from positions
  virtual void rope(Buffer x_snH, Buffer table_sH, int direction) = 0;          // in place; -1 rotates back: the gradient

  // --- body(first row, rows) for each `tile` of `rows`, in order; the last may have fewer. A body only computes: it makes, moves,
  // exchanges and marks nothing, so that who only counts may read one for all that are alike.
  using TileBody = std::function<void(int64_t first, int64_t rows)>;
  virtual void for_tiles(int64_t rows, int64_t tile, const TileBody& body) {
    for (int64_t first = 0; first < rows; first += tile) body(first, std::min(tile, rows - first));
  }

  // --- attention over this rank's heads of the whole sequence; documents are data. qkv_S: columns q nH | k kH | v kH.
  // The layout within lse_Sn is the engine's own. `workspace`: of ops/attention.h's size; no buffer on the CPU.
  virtual void attention(Buffer o_SnH, Buffer lse_Sn, Buffer qkv_S, Buffer workspace, const Heads& heads, const AttentionSchedule& schedule) = 0;
  virtual void attention_grad(Buffer dqkv_S, Buffer do_SnH, Buffer qkv_S, Buffer o_SnH, Buffer lse_Sn, Buffer workspace, const Heads& heads, const AttentionSchedule& schedule) = 0;

  // --- MLP and loss, a tile at a time
  virtual void swiglu(Buffer a_tF, Buffer gate_up_t2F) = 0;                     // a = silu(gate) * up
  virtual void swiglu_grad(Buffer gate_up_t2F, Buffer a_tF, Buffer da_tF) = 0;  // gate_up becomes its gradient; a, where it exists, is rebuilt
  virtual void cross_entropy(Buffer logits_tV, Buffer loss_t, Buffer labels_t) = 0;  // logits become their gradient times the batch's scale
  virtual void sum_loss(Buffer total_1, Buffer loss_s) = 0;                     // total (fp64) += scale * sum
  virtual void embed(Buffer h_sD, Buffer table_VD, Buffer ids_s) = 0;
  virtual void embed_grad(Buffer dtable_VD, Buffer dh_sD, Buffer ids_s) = 0;    // +=, in the order of tokens

  // --- exchange between ranks. Blocks lie in order of rank; counts are elements.
  virtual void pack_columns(Buffer send, Buffer x_s, const ColumnBlocks& blocks) = 0;
  virtual void unpack_columns(Buffer x_s, Buffer received, const ColumnBlocks& blocks) = 0;  // columns that several ranks sent are summed in fp32
  virtual Event all_to_all(Buffer received, Buffer send, Group group, const std::vector<int64_t>& receive_elements, const std::vector<int64_t>& send_elements) = 0;
  virtual Event all_gather(Buffer whole, Buffer shard, Group group) = 0;
  // After the wait, received holds every rank's piece for this rank, in order of rank: an all-to-all of equal pieces.
  virtual Event scatter(Buffer received, Buffer whole, Group group) = 0;
  virtual void sum_pieces(Buffer shard, Buffer received, int64_t pieces) = 0;   // shard += each piece, in order, fp32
  virtual Event all_reduce(Buffer x, Group group) = 0;                          // sum, in place
  virtual void wait(Event event) = 0;

  // --- optimizer, on shards
  virtual void squared_norm(Buffer total_1, Buffer x) = 0;                      // total (fp64) += sum of squares
  // Clips by the batch-wide norm (norm_1 holds its square), updates master and moments, writes the weight; does nothing at all where norm or loss is not finite. weight may be master (fp32 training); a master of
  // 16 bits (i16) is what the bf16 weight lacks of it. All buffers lie in one tier, device or host; norm and loss there too.
  virtual Event adamw(Buffer weight, Buffer master, Buffer m, Buffer v, Buffer gradient, Buffer norm_1, Buffer loss_1, const UpdateRange& range) = 0;
};

// A buffer with a life: C++ scope is the buffer's life, so that lifetimes are read off the braces.
class Held {
 public:
  Held() = default;
  Held(Ops& ops, int64_t rows, int64_t columns, Dtype dtype, Kind kind, std::string_view what, Tier tier = Tier::kDevice) : ops_(&ops), b_(ops.make(rows, columns, dtype, kind, what, Life::kStep, tier)) {}
  Held(Held&& o) noexcept : ops_(o.ops_), b_(o.b_) { o.ops_ = nullptr; o.b_ = Buffer{}; }
  Held& operator=(Held&& o) noexcept {
    if (this != &o) {
      reset();
      ops_ = o.ops_, b_ = o.b_;
      o.ops_ = nullptr, o.b_ = Buffer{};
    }
    return *this;
  }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;
  ~Held() { reset(); }
  void reset() {
    if (ops_) ops_->release(b_);
    ops_ = nullptr, b_ = Buffer{};
  }
  const Buffer& operator*() const { return b_; }
  operator Buffer() const { return b_; }
  bool exists() const { return b_.exists(); }

 private:
  Ops* ops_ = nullptr;
  Buffer b_;
};

}  // namespace uly::ops
