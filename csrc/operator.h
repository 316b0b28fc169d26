#pragma once
#include <ATen/core/dispatch/Dispatcher.h>

#include <string>

namespace tutelx {

// An operator of tutelx by its name.
template <class Function>
c10::TypedOperatorHandle<Function> find(const char* name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((std::string("tutelx::") + name).c_str(), "")
      .template typed<Function>();
}

}  // namespace tutelx
