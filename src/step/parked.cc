#include "step/parked.h"

#include "base/check.h"

namespace uly::step {

void Parked::keep(ops::Ops& ops, ops::Held x, ops::Tier tier, const char* what) {
  ULY_CHECK(!exists(), "a tensor is kept once");
  ops_ = &ops;
  here_ = std::move(x);
  if (tier != ops::Tier::kDevice) leave(tier, what);
}

void Parked::leave(ops::Tier tier, const char* what) {
  if (there_.exists()) return drop();
  const ops::Buffer b = *here_;
  rows_ = b.rows, columns_ = b.columns, dtype_ = b.dtype, what_ = what;
  there_ = ops::Held(*ops_, rows_, columns_, dtype_, ops::Kind::kSaved, what, tier);
  going_ = ops_->move(there_, here_);
}

void Parked::arrive(ops::Event& event) {
  if (event.id >= 0) ops_->wait(event);
  event = {};
}

void Parked::settle() {
  if (going_.id < 0) return;
  arrive(going_);
  here_.reset();
}

void Parked::want() {
  arrive(going_);
  if (here_.exists() || !there_.exists()) return;
  here_ = ops::Held(*ops_, rows_, columns_, dtype_, ops::Kind::kSaved, what_);
  coming_ = ops_->move(here_, there_);
}

ops::Buffer Parked::device() {
  if (!here_.exists()) want();
  arrive(coming_);
  return here_;
}

void Parked::drop() {
  if (!there_.exists()) return;
  arrive(going_), arrive(coming_);
  here_.reset();
}

ops::Held Parked::take() {
  device();
  arrive(going_);
  there_.reset();
  return std::move(here_);
}

void Parked::reset() {
  arrive(going_), arrive(coming_);
  there_.reset();
  here_.reset();
}

}  // namespace uly::step
