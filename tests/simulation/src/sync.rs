//! What tasks wait for: a signal, a value, a queue, the first of two things.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::rc::Rc;
use std::task::Poll;

use futures::future::{Either, select};

use crate::kernel::{HostId, Kernel, Nanos, TaskNo};

/// Counts changes; whoever waits is woken by each.
#[derive(Clone)]
pub struct Signal {
    kernel: Kernel,
    version: Rc<Cell<u64>>,
    waiting: Rc<RefCell<Vec<TaskNo>>>,
}

impl Signal {
    pub fn new(kernel: &Kernel) -> Self {
        Self { kernel: kernel.clone(), version: Rc::default(), waiting: Rc::default() }
    }

    pub fn notify(&self) {
        self.version.set(self.version.get() + 1);
        for task in self.waiting.take() {
            self.kernel.wake(task);
        }
    }

    pub fn version(&self) -> u64 {
        self.version.get()
    }

    /// Waits until it has changed since it was at `seen`.
    pub fn changed_since(&self, seen: u64) -> impl Future<Output = ()> + use<> {
        let signal = self.clone();
        std::future::poll_fn(move |_| match signal.version.get() != seen {
            true => Poll::Ready(()),
            false => {
                signal.wait();
                Poll::Pending
            }
        })
    }

    /// Waits until a condition holds that changes with this signal.
    pub fn until<T>(&self, mut condition: impl FnMut() -> Option<T>) -> impl Future<Output = T> {
        let signal = self.clone();
        std::future::poll_fn(move |_| match condition() {
            Some(value) => Poll::Ready(value),
            None => {
                signal.wait();
                Poll::Pending
            }
        })
    }

    fn wait(&self) {
        let task = self.kernel.current();
        let mut waiting = self.waiting.borrow_mut();
        if !waiting.contains(&task) {
            waiting.push(task);
        }
    }
}

/// A value that comes once.
pub struct Promise<T> {
    value: Rc<RefCell<Option<T>>>,
    signal: Signal,
}

impl<T> Clone for Promise<T> {
    fn clone(&self) -> Self {
        Self { value: Rc::clone(&self.value), signal: self.signal.clone() }
    }
}

impl<T> Promise<T> {
    pub fn new(kernel: &Kernel) -> Self {
        Self { value: Rc::default(), signal: Signal::new(kernel) }
    }

    /// Only the first value counts.
    pub fn keep(&self, value: T) {
        if self.signal.version() == 0 {
            *self.value.borrow_mut() = Some(value);
            self.signal.notify();
        }
    }

    pub async fn wait(self) -> T {
        let value = self.value;
        self.signal.until(move || value.borrow_mut().take()).await
    }
}

/// A queue with one reader.
pub struct Queue<T> {
    items: Rc<RefCell<VecDeque<T>>>,
    signal: Signal,
}

impl<T> Clone for Queue<T> {
    fn clone(&self) -> Self {
        Self { items: Rc::clone(&self.items), signal: self.signal.clone() }
    }
}

impl<T> Queue<T> {
    pub fn new(kernel: &Kernel) -> Self {
        Self { items: Rc::default(), signal: Signal::new(kernel) }
    }

    pub fn push(&self, item: T) {
        self.items.borrow_mut().push_back(item);
        self.signal.notify();
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.items.borrow().len()
    }

    pub fn try_pop(&self) -> Option<T> {
        self.items.borrow_mut().pop_front()
    }

    pub async fn pop(&self) -> T {
        let items = Rc::clone(&self.items);
        self.signal.until(move || items.borrow_mut().pop_front()).await
    }
}

/// Waits for the first of two; of two that are ready, the left one counts.
pub async fn first<A, B>(
    left: impl Future<Output = A>,
    right: impl Future<Output = B>,
) -> Either<A, B> {
    let (left, right) = (Box::pin(left), Box::pin(right));
    match select(left, right).await {
        Either::Left((value, _)) => Either::Left(value),
        Either::Right((value, _)) => Either::Right(value),
    }
}

/// Waits for something, but not longer than this by the host's clock.
pub async fn within<T>(
    kernel: &Kernel,
    host: HostId,
    at_most: Nanos,
    what: impl Future<Output = T>,
) -> Option<T> {
    match first(what, kernel.sleep(host, at_most)).await {
        Either::Left(value) => Some(value),
        Either::Right(()) => None,
    }
}

/// Waits for all of them, which go on at the same time.
pub async fn all<T>(futures: impl Iterator<Item = impl Future<Output = T>>) -> Vec<T> {
    let mut waiting: Vec<_> = futures.map(|future| (Box::pin(future), None)).collect();
    std::future::poll_fn(|context| {
        let mut ready = true;
        for (future, value) in waiting.iter_mut().filter(|(_, value)| value.is_none()) {
            match future.as_mut().poll(context) {
                Poll::Ready(it) => *value = Some(it),
                Poll::Pending => ready = false,
            }
        }
        if ready { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    waiting.into_iter().filter_map(|(_, value)| value).collect()
}
