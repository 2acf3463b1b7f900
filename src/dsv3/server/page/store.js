// Where conversations are kept: IndexedDB, one record each. A browser that gives none (some private windows) still
// chats, and is told that nothing stays. Tabs tell each other what they changed, so that none overwrites another.

let database = null;
const channel = "BroadcastChannel" in window ? new BroadcastChannel("conversations") : null;

const result = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

const objects = (mode) => database.transaction("conversations", mode).objectStore("conversations");

/** Opens the store and gives all conversations, or null if this browser keeps none. */
export async function open() {
  try {
    const request = indexedDB.open("chat", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("conversations", { keyPath: "id" });
    database = await result(request);
    return await result(objects("readonly").getAll());
  } catch {
    database = null;
    return null;
  }
}

/** Keeps a conversation as it is now. Gives whether that worked (the disk may be full). */
export const save = (conversation) => change(conversation.id, (store) => store.put(conversation));

export const remove = (id) => change(id, (store) => store.delete(id));

export const get = (id) => result(objects("readonly").get(id));

async function change(id, request) {
  if (!database) return true;
  try {
    await result(request(objects("readwrite")));
    channel?.postMessage(id);
    return true;
  } catch {
    return false;
  }
}

/** Calls back with the id of a conversation that another tab changed or removed. */
export function onChange(callback) {
  channel?.addEventListener("message", (event) => callback(event.data));
}
