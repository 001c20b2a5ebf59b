// A tensor that backward will want, kept in some tier until then. On the device it simply stays; elsewhere it goes there
// under what is computed next, and comes back before it is needed.
//
// keep, device() while it is there, settle; want, device(), drop; ...; want, take() or device() and reset().
#pragma once

#include "ops/ops.h"

namespace uly::step {

class Parked {
 public:
  // Takes x, whose values are final, and starts its way to `tier`. x may still be read, until settle().
  void keep(ops::Ops& ops, ops::Held x, ops::Tier tier, const char* what);
  // Has gone: what the device held is released. Nothing where it stays there.
  void settle();
  // Starts the way to `tier`, of a tensor that has stayed; settle() follows. Nothing where it is kept elsewhere already but to
  // release what the device holds.
  void leave(ops::Tier tier, const char* what);
  // Starts the way back, if it is away.
  void want();
  // The tensor on the device; waits for the way back.
  ops::Buffer device();
  // Releases what the device holds of a tensor that is kept elsewhere: it will be wanted again.
  void drop();
  // As device(), for the last time: whoever takes it releases it.
  ops::Held take();
  // Nobody wants it any more.
  void reset();

  bool exists() const { return here_.exists() || there_.exists(); }

 private:
  void arrive(ops::Event& event);

  ops::Ops* ops_ = nullptr;
  ops::Held here_, there_;
  ops::Event going_, coming_;
  int64_t rows_ = 0, columns_ = 0;
  Dtype dtype_ = Dtype::kF32;
  const char* what_ = "";
};

}  // namespace uly::step
