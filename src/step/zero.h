// ZeRO-3 and the tiers of weights, gradients and optimizer: what each rank keeps of every unit and where, weights brought
// ahead of use and released after, gradients reduced to their owners as soon as a unit's backward is done, updates under the
// forward that needs them.
//
// Source      arXiv:1910.02054, stage 3; the tiers: arXiv:2104.07857, sections 5 and 6.  W = 1 gathers and reduces nothing: the
//             shard is the whole.
// A second copy of the weights inside a node is that of arXiv:2306.10209, section 3.2, in the compute dtype.
// Collective  world group, node group; a gather moves elements * bytes of the weights, a reduction elements * bytes of the wire type,
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
  ops::Buffer near;      // this rank's part of the node's copy of the weights; 1 x W / node shards
  ops::Buffer copy;      // of a weight on the device whose master of 16 bits is updated on the host: the other half of it
};

struct States {
  std::vector<UnitState> units;
  ops::Buffer loss_total;  // fp64
  ops::Buffer norm_total;  // fp64, square of the gradient's norm
  // The same of the step whose update has not been made yet, in each tier where updates are.
  ops::Buffer applied_loss, applied_norm, host_loss, host_norm;
};

int64_t shard_elements(const models::Unit& unit, int64_t W);

// Makes everything that lives between steps.
States make_states(ops::Ops& ops, const std::vector<models::Unit>& units, const Options& options);

// Pieces of a rank's shard of a unit by their rule for weight decay.
std::vector<ops::UpdateRange> update_ranges(const models::Unit& unit, const Mesh& mesh);

// What a program does besides forward and backward.
struct Phase {
  bool first = true;    // micro-batch of the step: its gradients take the place of the last step's
  bool last = true;     // after it the gradients are final: their norm is summed, they leave the device
  bool update = false;  // each unit is updated before it is used
};

class Zero {
 public:
  Zero(ops::Ops& ops, const std::vector<models::Unit>& units, const Options& options, const States& states, const Phase& phase);
  ~Zero();

  // Updates unit u where that is still to be done, and starts to bring its weights and the next unit's states; does nothing
  // where they are under way or there.
  void prefetch(size_t u);
  // Returns the unit's whole flat weights, waiting for them; a view of the buffer that release() frees.
  ops::Buffer weights(size_t u);
  void release(size_t u);

  // Returns the unit's whole flat gradient, fp32, to be added to. Where products_add(u) is false, the matrices of linear maps
  // hold nothing yet: their linear_dw has to write, once, the first time that a unit is asked for.
  ops::Buffer gradient(size_t u);
  bool products_add() const { return options_.mesh.W == 1 && !phase_.first; }
  // Sends the gradient to its owners; the sum is taken while the next unit works. `final`: nothing comes after it in this
  // micro-batch.
  void reduce(size_t u, bool final = true);
  // Finishes what is under way.
  void flush();

  // Updates every unit that has not been.
  void update_all();
  // Waits for what updates have under way, at the end of forward.
  void updates_done();

 private:
  struct Brought {  // weights
    ops::Held shard, whole;
    ops::Event event;
    bool arrived = false;
  };
  struct Reducing {
    size_t unit = 0;
    bool final = true;
    ops::Held sent, received;
    ops::Event event;
  };
  // Elements [first, first + count) of a unit's states on their way through the device.
  struct Piece {
    int64_t first = 0, count = 0;
    ops::Held weight, master, m, v, gradient;
    std::vector<ops::Event> coming, going;
  };
  struct Updating {
    std::vector<Piece> pieces;           // through the device
    size_t started = 0;
    ops::Held weight;                    // of an update on the host: on its way to the device
    std::vector<ops::Event> events;
  };

  void zero_all_but_products(size_t u, const ops::Buffer& gradient);
  // The gradient's norm, where it is final, and its way off the device.
  void leave(size_t u, bool final, ops::Held on_device, ops::Buffer gradient);
  void settle_gradient();
  void arrive(size_t u);
  void start_update(size_t u);
  void start_updates_after(size_t u);
  void start_pieces(size_t u, size_t until);
  void finish_update(size_t u);
  void settle(Piece& piece);
  void settle_pieces();

  ops::Ops& ops_;
  const std::vector<models::Unit>& units_;
  const Options& options_;
  const States& states_;
  Phase phase_;
  std::vector<char> near_;             // units whose weights the node has
  std::vector<char> begun_, reduced_;  // units whose gradient has been asked for, has reached its owners
  std::vector<std::optional<Brought>> brought_;
  ops::Held gradient_;                 // of the unit in backward, where it does not lie in its state
  std::optional<Reducing> reducing_;
  struct Leaving {
    ops::Held gradient;
    ops::Event event;
  };
  std::optional<Leaving> leaving_;
  struct Arriving {
    ops::Held weight;                  // on the host
    ops::Event event;
  };
  std::vector<std::optional<Arriving>> arriving_;
  std::vector<std::optional<Updating>> updating_;
  std::vector<char> updated_;
  std::vector<Piece> settling_;        // pieces that go home
};

}  // namespace uly::step
