// The interpreter that prices a program: what every buffer costs over its life, where each lies, how much arithmetic and
// traffic the program asks for, and when each instruction would run on which stream. It computes nothing and needs
// milliseconds.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "ops/ops.h"
#include "ops/places.h"
#include "plan/rates.h"

namespace uly::plan {

using ops::Places;

// Bytes in one tier.
struct TierPrice {
  int64_t run_bytes = 0;                             // weights and states, alive between steps
  std::array<int64_t, ops::kNumKinds> run_by_kind{};
  int64_t peak_bytes = 0;                            // the most that is alive at once within the program
  std::array<int64_t, ops::kNumKinds> peak_by_kind{};  // at that moment
  std::string peak_where;                            // "attention backward, layer 3"

  int64_t alive() const { return run_bytes + peak_bytes; }
};

// Seconds of a program by stream; each does one thing after the other, all at the same time.
enum class Stream : uint8_t { kCompute, kToHost, kToDevice, kDisk, kHost, kNetwork };
inline constexpr int kNumStreams = 6;

struct Price {
  std::array<TierPrice, ops::kNumTiers> tiers;
  Places run_places, step_places;
  const TierPrice& of(ops::Tier tier) const { return tiers[static_cast<size_t>(tier)]; }
  // Where the buffers lie, with the gaps between them.
  int64_t total_bytes(ops::Tier tier = ops::Tier::kDevice) const { return run_places.of(tier) + step_places.of(tier); }

  // When each stream is busy, and when compute comes to each mark: only where asked for.
  struct Interval {
    double begin = 0, end = 0;
  };
  struct Mark {
    std::string where;
    double at = 0;
  };
  std::array<std::vector<Interval>, kNumStreams> intervals;
  std::vector<Mark> marks;

  double seconds = 0;                                // from first to last
  std::array<double, kNumStreams> busy{};            // of each stream
  std::array<double, kNumStreams> waited{};          // that compute waited for each
  double gemm_flops = 0, attention_flops = 0;        // attention counts the causal half
  double moved_bytes = 0;                            // by element-wise instructions
  double exchanged_bytes = 0, gathered_bytes = 0, scattered_bytes = 0;  // sent by this rank
};

// Gives every buffer a place in its tier such that no two that are alive together overlap: each the lowest that is free, in the
// order that wastes least of a few. `birth` and `death` are times; death < 0 means never.
struct Lifetime {
  ops::Tier tier = ops::Tier::kDevice;
  int64_t bytes = 0, birth = 0, death = -1;
};
Places place(const std::vector<Lifetime>& lives);

// Reads programs. price() places the buffers; peak() is the cheaper question.
class Priced final : public ops::Ops {
 public:
  // `s`: tokens of the rank's shard; `document_table_bytes`: see ops/attention.h.
  // With `record` the times of all that runs are kept too.
  Priced(const std::array<int64_t, 2>& group_sizes, int64_t s, int64_t document_table_bytes, const Rates& rates = {}, bool record = false);
  Price price() const;
  // Without places.
  const Price& so_far() const { return price_; }

  ops::Buffer make(int64_t rows, int64_t columns, Dtype dtype, ops::Kind kind, std::string_view what, ops::Life life, ops::Tier tier) override;
  void release(const ops::Buffer& b) override;
  ops::Buffer input(ops::Input which) override;
  void zero(ops::Buffer y) override { moved({y}); }
  void copy(ops::Buffer y, ops::Buffer x) override { moved({y, x}); }
  ops::Event move(ops::Buffer y, ops::Buffer x) override;
  void mark(std::string_view where, int64_t layer) override;
  void for_tiles(int64_t rows, int64_t tile, const TileBody& body) override;
  void linear(ops::Buffer y, ops::Buffer x, ops::Buffer) override { gemm(y.rows, y.columns, x.columns); }
  void linear_add(ops::Buffer y, ops::Buffer x, ops::Buffer, ops::Buffer) override { gemm(y.rows, y.columns, x.columns); }
  void linear_dx(ops::Buffer dx, ops::Buffer dy, ops::Buffer) override { gemm(dx.rows, dx.columns, dy.columns); }
  void linear_dw(ops::Buffer dw, ops::Buffer dy, ops::Buffer, bool) override { gemm(dw.rows, dw.columns, dy.rows); }
  void add_bias(ops::Buffer y, ops::Buffer) override { moved({y, y}); }
  void bias_grad(ops::Buffer, ops::Buffer dy) override { moved({dy}); }
  void rms_norm(ops::Buffer y, ops::Buffer, ops::Buffer x, ops::Buffer, double) override { moved({y, x}); }
  void rms_norm_grad(ops::Buffer dx, ops::Buffer, ops::Buffer dy, ops::Buffer x, ops::Buffer, ops::Buffer) override { moved({dx, dx, dy, x}); }
  void norm_rope(ops::Buffer x, ops::Buffer raw, ops::Buffer, ops::Buffer, ops::Buffer table, double) override { moved({x, x, raw, table}); }
  void norm_rope_grad(ops::Buffer dx, ops::Buffer, ops::Buffer raw, ops::Buffer, ops::Buffer, ops::Buffer table) override { moved({dx, dx, raw, table}); }
  void rope_table(ops::Buffer table) override { moved({table}); }
  void rope(ops::Buffer x, ops::Buffer table, int) override { moved({x, x, table}); }
  void attention(ops::Buffer o, ops::Buffer lse, ops::Buffer qkv, ops::Buffer workspace, const ops::Heads& heads, const ops::AttentionSchedule& schedule) override;
  void attention_grad(ops::Buffer dqkv, ops::Buffer d_o, ops::Buffer qkv, ops::Buffer o, ops::Buffer lse, ops::Buffer workspace, const ops::Heads& heads, const ops::AttentionSchedule& schedule) override;
  void swiglu(ops::Buffer a, ops::Buffer gate_up) override { moved({a, gate_up}); }
  void swiglu_grad(ops::Buffer gate_up, ops::Buffer a, ops::Buffer da) override { moved({gate_up, gate_up, a, da}); }
  void cross_entropy(ops::Buffer logits, ops::Buffer, ops::Buffer) override { moved({logits, logits, logits}); }
  void sum_loss(ops::Buffer, ops::Buffer loss) override { moved({loss}); }
  void embed(ops::Buffer h, ops::Buffer, ops::Buffer) override { moved({h, h}); }
  void embed_grad(ops::Buffer, ops::Buffer dh, ops::Buffer) override { moved({dh, dh, dh}); }
  void pack_columns(ops::Buffer send, ops::Buffer, const ops::ColumnBlocks&) override { moved({send, send}); }
  void unpack_columns(ops::Buffer, ops::Buffer received, const ops::ColumnBlocks&) override { moved({received, received}); }
  ops::Event all_to_all(ops::Buffer received, ops::Buffer send, ops::Group group, const std::vector<int64_t>& receive, const std::vector<int64_t>& send_elements) override;
  ops::Event all_gather(ops::Buffer whole, ops::Buffer shard, ops::Group group) override;
  ops::Event scatter(ops::Buffer received, ops::Buffer whole, ops::Group group) override;
  void sum_pieces(ops::Buffer shard, ops::Buffer received, int64_t) override { moved({shard, shard, received}); }
  ops::Event all_reduce(ops::Buffer, ops::Group) override { return aside(Stream::kNetwork, 0); }  // few numbers
  void wait(ops::Event) override;
  void squared_norm(ops::Buffer, ops::Buffer x) override { moved({x}); }
  ops::Event adamw(ops::Buffer weight, ops::Buffer master, ops::Buffer m, ops::Buffer v, ops::Buffer gradient, ops::Buffer norm, ops::Buffer loss, const ops::UpdateRange& range) override;

 private:
  void gemm(int64_t m, int64_t n, int64_t k);
  void moved(std::initializer_list<ops::Buffer> buffers);
  // Takes the compute stream for so long.
  void compute(double seconds);
  // Of attention over `rows` tokens; rate: of long documents.
  void attend(double flops, double rate, int64_t rows, const ops::AttentionSchedule& schedule);
  void note(Stream stream, double begin, double end);
  // Takes another one, from when compute has come here and that stream is free.
  ops::Event aside(Stream stream, double seconds);

  std::array<int64_t, 2> group_sizes_;
  std::array<ops::Buffer, ops::kNumInputs> inputs_;
  Rates rates_;
  bool record_;
  Price price_;
  std::vector<Lifetime> run_, step_;
  std::vector<ops::Kind> kinds_;                 // of step buffers
  std::array<std::array<int64_t, ops::kNumKinds>, ops::kNumTiers> live_by_kind_{};
  std::array<int64_t, ops::kNumTiers> live_{};
  int64_t clock_ = 0;
  double times_ = 1;                             // that what is being read runs
  std::array<double, kNumStreams> free_at_{};    // seconds from the program's start
  std::vector<std::pair<Stream, double>> events_;  // when each has happened
  std::string where_;
  int64_t layer_ = -1;
  std::array<std::pair<std::string, int64_t>, ops::kNumTiers> peak_at_;  // where_ and layer_ when it was reached
  double sent_bytes_total(const std::vector<int64_t>& elements, Dtype dtype) const;
};

}  // namespace uly::plan
