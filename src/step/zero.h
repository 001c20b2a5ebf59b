// ZeRO-3: what each rank keeps of every unit, weights gathered ahead of use and released after, gradients reduced to
// their owners as soon as a unit's backward is done.
//
// Source      arXiv:1910.02054, stage 3.  W = 1 gathers and reduces nothing: the shard is the whole.
// Collective  world group; a gather moves elements * bytes of the weights, a reduction elements * bytes of the wire type,
//             and the owner sums in fp32, in order of rank.
#pragma once

#include <optional>
#include <vector>

#include "step/options.h"

namespace uly::step {

// What a rank keeps of one unit between steps; all are 1 x shard_elements.
struct UnitState {
  ops::Buffer weight;    // compute dtype; in fp32 training the same buffer as master
  ops::Buffer master;    // fp32, or i16: what a bf16 weight lacks of it
  ops::Buffer m, v;      // fp32
  ops::Buffer gradient;  // fp32, of the micro-batches of a step so far
};

struct States {
  std::vector<UnitState> units;
  ops::Buffer loss_total;  // fp64
  ops::Buffer norm_total;  // fp64, square of the gradient's norm
};

int64_t shard_elements(const models::Unit& unit, int64_t W);

// Makes everything that lives between steps.
States make_states(ops::Ops& ops, const std::vector<models::Unit>& units, const Options& options);

class Zero {
 public:
  // `first`: this is the step's first micro-batch, whose gradients take the place of the last step's.
  Zero(ops::Ops& ops, const std::vector<models::Unit>& units, const Options& options, const States& states, bool first);
  ~Zero();

  // Starts the gather of unit u; does nothing where it is under way or there.
  void prefetch(size_t u);
  // Returns the unit's whole flat weights, waiting for them; a view of the buffer that release() frees.
  ops::Buffer weights(size_t u);
  void release(size_t u);

  // Returns the unit's whole flat gradient, fp32, to be added to. Where products_add() is false, the matrices of linear maps
  // hold nothing yet: their linear_dw has to write, once, the first time that a unit is asked for.
  ops::Buffer gradient(size_t u);
  bool products_add() const { return options_.mesh.W == 1 && !first_; }
  // Sends the gradient to its owners; the sum is taken while the next unit works.
  void reduce(size_t u);
  // Finishes the reduction under way.
  void flush();

 private:
  struct Gathered {
    ops::Held whole;
    ops::Event event;
    bool arrived = false;
  };
  struct Reducing {
    size_t unit = 0;
    ops::Held sent, received;
    ops::Event event;
  };

  void zero_all_but_products(size_t u, const ops::Buffer& gradient);

  ops::Ops& ops_;
  const std::vector<models::Unit>& units_;
  const Options& options_;
  const States& states_;
  bool first_;
  std::vector<char> begun_, reduced_;  // units whose gradient has been asked for, has reached its owners
  std::vector<std::optional<Gathered>> gathered_;
  ops::Held gradient_;
  std::optional<Reducing> reducing_;
};

}  // namespace uly::step
