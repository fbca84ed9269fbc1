// What the simulated device was asked to do, in order, while recording is on.
#pragma once
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/utils/pybind.h>

#include <atomic>
#include <mutex>
#include <string>
#include <vector>

namespace simulator {

// One request: an operator, a copy between host and device ("copy_from_host", "copy_to_host"), or "synchronize".
struct Request {
  std::string phase;                 // as `start` or the last `mark` named it
  std::string name;                  // "mul.Tensor": an operator and its overload, without "aten::"
  std::vector<std::string> tensors;  // "npu Float[4, 32]" for each tensor among the arguments, lists flattened
  std::string place;                 // for what makes the host wait: the Python line that asked for it
};

class Recorder {
 public:
  bool on() const { return on_ && quiet_ == 0; }

  void start(const std::string& phase) {
    std::lock_guard<std::mutex> lock(mutex_);
    requests_.clear();
    phase_ = phase;
    on_ = true;
  }

  void mark(const std::string& phase) {
    std::lock_guard<std::mutex> lock(mutex_);
    phase_ = phase;
  }

  std::vector<Request> stop() {
    std::lock_guard<std::mutex> lock(mutex_);
    on_ = false;
    return std::move(requests_);
  }

  // While it lives, what this thread asks for is not recorded: the simulator's own way of doing what it was asked.
  struct Quiet {
    Quiet() { ++quiet_; }
    ~Quiet() { --quiet_; }
  };

  // `locate` is called without arguments and returns the Python line that runs.
  void setLocator(pybind11::function locate) { locate_ = new pybind11::function(std::move(locate)); }

  void add(std::string name, const std::vector<at::Tensor>& tensors, bool host_waits = false) {
    if (!on()) return;
    std::vector<std::string> descriptions;
    for (const auto& tensor : tensors) descriptions.push_back(describe(tensor));
    std::string place = host_waits ? here() : "";
    std::lock_guard<std::mutex> lock(mutex_);
    requests_.push_back({phase_, std::move(name), std::move(descriptions), std::move(place)});
  }

 private:
  static std::string describe(const at::Tensor& tensor) {
    if (!tensor.defined()) return "none";
    std::ostringstream text;
    text << (tensor.device().is_cpu() ? "cpu " : "npu ") << tensor.scalar_type() << tensor.sizes();
    return text.str();
  }

  std::string here() const {
    if (locate_ == nullptr) return "";
    pybind11::gil_scoped_acquire gil;
    return (*locate_)().cast<std::string>();
  }

  static inline thread_local int quiet_ = 0;
  std::atomic<bool> on_{false};
  std::mutex mutex_;
  std::string phase_;
  std::vector<Request> requests_;
  pybind11::function* locate_ = nullptr;  // never freed: the interpreter may be gone when statics are
};

inline Recorder& recorder() {
  static Recorder instance;
  return instance;
}

// The tensors among an operator's arguments on top of the stack, lists flattened; numbers that became one are left out.
inline std::vector<at::Tensor> tensorArguments(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  std::vector<at::Tensor> found;
  for (size_t i = stack.size() - op.schema().arguments().size(); i < stack.size(); ++i) {
    const auto& value = stack[i];
    if (value.isTensor()) {
      found.push_back(value.toTensor());
    } else if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorVector()) found.push_back(tensor);
    } else if (value.isList()) {  // of optional tensors: the indices of `index`
      for (const c10::IValue& element : value.toListRef()) {
        if (element.isTensor()) found.push_back(element.toTensor());
      }
    }
  }
  const auto is_number = [](const at::Tensor& tensor) {
    return tensor.defined() && tensor.unsafeGetTensorImpl()->is_wrapped_number();
  };
  found.erase(std::remove_if(found.begin(), found.end(), is_number), found.end());
  return found;
}

}  // namespace simulator
