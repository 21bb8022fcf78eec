-- API keys: finding, making, changing, rotating and revoking them. No key makes or changes a key that may do
-- more than itself.

-- Tables
-- ------

create table public.api_keys_new (
    id bigint generated always as identity primary key,
    user_id bigint not null references public.users (id),
    key_name text not null check (length(key_name) between 1 and 100),
    key_prefix text not null check (length(key_prefix) between 1 and 16),
    last4 text not null check (length(last4) = 4),
    key_hash text not null check (key_hash ~ '^[0-9a-f]{64}$'),
    hash_secret_id text not null,
    encrypted_key text,
    environment_tag text not null default 'live'
        check (environment_tag in ('live', 'test', 'staging', 'development')),
    scope_permissions jsonb not null default '{"read": ["*"], "write": ["*"]}'
        check (jsonb_typeof(scope_permissions) = 'object'),
    ip_allowlist cidr[] not null default '{}',
    domain_referrers text[] not null default '{}',
    allowed_models text[],
    expiration_date timestamptz,
    max_requests bigint check (max_requests > 0),
    budget_nanos bigint check (budget_nanos >= 0),
    budget_window text check (budget_window in ('day', 'week', 'month', 'lifetime')),
    is_primary boolean not null default false,
    is_active boolean not null default true,
    previous_key_hash text check (previous_key_hash ~ '^[0-9a-f]{64}$'),
    previous_hash_secret_id text,
    previous_valid_until timestamptz,
    revoked_at timestamptz,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    cache_ttl_seconds int check (cache_ttl_seconds between 1 and 86400),
    constraint api_keys_new_budget_has_window check ((budget_nanos is null) = (budget_window is null))
) with (fillfactor = 80);
comment on table public.api_keys_new is
    'The keys. Only an HMAC is stored; requests_used and last_used_at live in rate_limit_usage.';
comment on column public.api_keys_new.cache_ttl_seconds is
    'Requests of this key use the response cache unless they say otherwise; null: only those that ask.';
create unique index api_keys_new_hash_key on public.api_keys_new (key_hash);
create unique index api_keys_new_previous_hash_key on public.api_keys_new (previous_key_hash)
    where previous_key_hash is not null;
create unique index api_keys_new_name_key on public.api_keys_new (user_id, key_name) where revoked_at is null;
comment on index public.api_keys_new_name_key is
    'A name is unique among a user''s keys that are not revoked.';
create unique index api_keys_new_primary_key on public.api_keys_new (user_id)
    where is_primary and revoked_at is null;
create index api_keys_new_user_idx on public.api_keys_new (user_id);
create index api_keys_new_prefix_idx on public.api_keys_new (last4);
alter table public.api_keys_new enable row level security;
revoke all on public.api_keys_new from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.api_keys_new to service_role;
revoke all on sequence public.api_keys_new_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.api_keys_new_id_seq to service_role;

create table public.api_keys (
    id bigint generated always as identity primary key,
    user_id bigint not null references public.users (id),
    key_sha256 text not null unique check (key_sha256 ~ '^[0-9a-f]{64}$'),
    key_name text not null check (length(key_name) between 1 and 100),
    key_prefix text not null check (length(key_prefix) between 1 and 16),
    last4 text not null check (length(last4) = 4),
    environment_tag text not null default 'live'
        check (environment_tag in ('live', 'test', 'staging', 'development')),
    scope_permissions jsonb not null default '{"read": ["*"], "write": ["*"]}'
        check (jsonb_typeof(scope_permissions) = 'object'),
    expiration_date timestamptz,
    max_requests bigint check (max_requests > 0),
    is_active boolean not null default true,
    moved_to bigint references public.api_keys_new (id),
    created_at timestamptz not null default now()
);
comment on table public.api_keys is
    'Keys of older formats, brought in by import, known by their SHA-256 until they are moved to '
    'api_keys_new on first use.';
create index api_keys_user_idx on public.api_keys (user_id);
alter table public.api_keys enable row level security;
revoke all on public.api_keys from public, anon, authenticated, service_role;
grant select, insert, update, delete on public.api_keys to service_role;
revoke all on sequence public.api_keys_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.api_keys_id_seq to service_role;

-- What a key may do
-- -----------------

create function public.scope_allows(p_scopes jsonb, p_verb text, p_resource text) returns boolean
language sql immutable as $$
    select coalesce((p_scopes -> p_verb) ?| array['*', p_resource], false)
$$;
revoke all on function public.scope_allows(jsonb, text, text) from public, anon, authenticated;
grant execute on function public.scope_allows(jsonb, text, text) to service_role;

create function public.domain_allowed(p_allowed text[], p_domain text) returns boolean
language sql immutable as $$
    select coalesce(bool_or(
        p_domain = d or (d like '*.%' and length(p_domain) > length(d) - 1
                         and right(p_domain, length(d) - 1) = substr(d, 2))), false)
    from unnest(p_allowed) as d
$$;
comment on function public.domain_allowed is 'Exact, or *.example.com for anything below example.com.';
revoke all on function public.domain_allowed(text[], text) from public, anon, authenticated;
grant execute on function public.domain_allowed(text[], text) to service_role;

create function public.models_allowed(p_allowed text[], p_models text[]) returns boolean
language sql immutable as $$
    select p_allowed is null or coalesce(bool_and(exists (
        select from unnest(p_allowed) as a where a = m or (right(a, 1) = '*' and starts_with(m, left(a, -1)))
    )), true) from unnest(p_models) as m
$$;
comment on function public.models_allowed is
    'Every model must be allowed: exact, or a prefix that ends with *; null allows all.';
revoke all on function public.models_allowed(text[], text[]) from public, anon, authenticated;
grant execute on function public.models_allowed(text[], text[]) to service_role;

create function public.scopes_within(p_inner jsonb, p_outer jsonb) returns boolean
language sql immutable set search_path = '' as $$
    select not exists (
        select from jsonb_each(p_inner) as verb (name, resources),
               jsonb_array_elements_text(verb.resources) as resource (name)
        where not coalesce((p_outer -> verb.name) ?| array['*', resource.name], false)
    )
$$;
comment on function public.scopes_within is
    'Whether everything that the inner scopes allow is allowed by the outer ones.';
revoke all on function public.scopes_within(jsonb, jsonb) from public, anon, authenticated;
grant execute on function public.scopes_within(jsonb, jsonb) to service_role;

-- A key of a lower environment may not make, change or end one of a higher.
create function public.environment_rank(p_environment text) returns int
language sql immutable set search_path = '' as $$
    select case p_environment when 'test' then 1 when 'live' then 3 else 2 end
$$;
revoke all on function public.environment_rank(text) from public, anon, authenticated;
grant execute on function public.environment_rank(text) to service_role;

-- In which field this key would go beyond the key that makes or changes it, or null. Null as well where there
-- is no such key: an administrator acts.
create function public.broader_than(p_key public.api_keys_new, p_maker public.api_keys_new) returns text
language plpgsql stable set search_path = '' as $$
begin
    if p_maker.id is null then
        return null;
    elsif not public.scopes_within(p_key.scope_permissions, p_maker.scope_permissions) then
        return 'scope_permissions';
    elsif public.environment_rank(p_key.environment_tag)
          > public.environment_rank(p_maker.environment_tag) then
        return 'environment_tag';
    elsif p_maker.expiration_date is not null
          and coalesce(p_key.expiration_date, 'infinity') > p_maker.expiration_date then
        return 'expiration_date';
    elsif p_maker.allowed_models is not null
          and (p_key.allowed_models is null
               or not public.models_allowed(p_maker.allowed_models, p_key.allowed_models)) then
        return 'allowed_models';
    elsif cardinality(p_maker.ip_allowlist) > 0 and (cardinality(p_key.ip_allowlist) = 0 or exists (
            select from unnest(p_key.ip_allowlist) as n where not n <<= any (p_maker.ip_allowlist))) then
        return 'ip_allowlist';
    elsif cardinality(p_maker.domain_referrers) > 0 and (cardinality(p_key.domain_referrers) = 0 or exists (
            select from unnest(p_key.domain_referrers) as d
            where not (d = any (p_maker.domain_referrers)
                       or public.domain_allowed(
                           case when d like '*.%'
                                then array(select m from unnest(p_maker.domain_referrers) m
                                           where m like '*.%')
                                else p_maker.domain_referrers end,
                           ltrim(d, '*.'))))) then
        return 'domain_referrers';
    elsif p_maker.max_requests is not null
          and (p_key.id is distinct from p_maker.id
               or coalesce(p_key.max_requests, 'infinity'::numeric) > p_maker.max_requests) then
        return 'max_requests';
    elsif p_maker.budget_nanos is not null
          and (p_key.id is distinct from p_maker.id or p_key.budget_nanos is null
               or p_key.budget_nanos > p_maker.budget_nanos
               or p_key.budget_window <> p_maker.budget_window) then
        return 'budget';
    end if;
    return null;
end $$;
comment on function public.broader_than is
    'A restricted key makes only keys with the same restrictions; one that counts requests or money makes '
    'none, as each key counts anew.';
revoke all on function public.broader_than(public.api_keys_new, public.api_keys_new)
    from public, anon, authenticated;
grant execute on function public.broader_than(public.api_keys_new, public.api_keys_new) to service_role;

-- Finding keys
-- ------------

-- The id of the key with one of these hashes: the current one, or the previous one within its grace. A key of
-- an older format that was moved is found by its hash like any other, so that rotating it ends the old
-- secret.
create function public.find_key(p_hashes text[]) returns bigint language plpgsql stable as $$
declare
    v_id bigint;
begin
    select id into v_id from public.api_keys_new where key_hash = any (p_hashes) limit 1;
    if v_id is null then
        select id into v_id from public.api_keys_new
        where previous_key_hash = any (p_hashes) and previous_valid_until > clock_timestamp() limit 1;
    end if;
    return v_id;
end $$;
revoke all on function public.find_key(text[]) from public, anon, authenticated;
grant execute on function public.find_key(text[]) to service_role;

-- Moves a key of an older format to api_keys_new. Its owner must be locked: of two concurrent first uses one
-- moves the key, and the other finds it moved.
create function public.move_legacy_key(
    p_legacy_hash text, p_hash text, p_secret_id text
) returns public.api_keys_new language plpgsql as $$
declare
    v_old public.api_keys;
    v_key public.api_keys_new;
begin
    select * into v_old from public.api_keys where key_sha256 = p_legacy_hash and moved_to is null for update;
    if not found then
        return null;
    end if;
    insert into public.api_keys_new (
        user_id, key_name, key_prefix, last4, key_hash, hash_secret_id, environment_tag,
        scope_permissions, expiration_date, max_requests, is_active)
    values (v_old.user_id, left(v_old.key_name, 80) || ' (imported ' || v_old.id || ')', v_old.key_prefix,
            v_old.last4, p_hash, p_secret_id, v_old.environment_tag, v_old.scope_permissions,
            v_old.expiration_date, v_old.max_requests, v_old.is_active)
    returning * into v_key;
    insert into public.rate_limit_usage (subject, subject_id, burst_ring, minute_ring, hour_ring, day_ring)
    values ('key', v_key.id, null, null, null, null);
    update public.api_keys set moved_to = v_key.id where id = v_old.id;
    return v_key;
end $$;
revoke all on function public.move_legacy_key(text, text, text) from public, anon, authenticated;
grant execute on function public.move_legacy_key(text, text, text) to service_role;

-- The key that acts. Read again after its user is locked, as it may have been revoked since it was verified.
create function public.acting_key(p jsonb) returns public.api_keys_new
language sql stable set search_path = '' as $$
    select k from public.api_keys_new k
    where k.id = (p ->> 'maker_id')::bigint and k.is_active and k.revoked_at is null
$$;
revoke all on function public.acting_key(jsonb) from public, anon, authenticated;
grant execute on function public.acting_key(jsonb) to service_role;

-- The ids of the HMAC secrets that stored keys still need. The gateway does not start without one of them.
create function public.key_secrets_in_use() returns jsonb language sql stable set search_path = '' as $$
    select coalesce(jsonb_agg(distinct s), '[]') from (
        select hash_secret_id as s from public.api_keys_new where revoked_at is null
        union select previous_hash_secret_id from public.api_keys_new where previous_valid_until > now()
    ) as used where s is not null
$$;
revoke all on function public.key_secrets_in_use() from public, anon, authenticated;
grant execute on function public.key_secrets_in_use() to service_role;

-- Making keys
-- -----------

-- The first key of a new account.
create function public.insert_key(p_user_id bigint, p_key jsonb, p_primary boolean) returns bigint
language plpgsql set search_path = '' as $$
declare
    v_id bigint;
begin
    insert into public.api_keys_new (
        user_id, key_name, key_prefix, last4, key_hash, hash_secret_id, environment_tag, scope_permissions,
        is_primary)
    values (p_user_id, p_key ->> 'key_name', p_key ->> 'key_prefix', p_key ->> 'last4', p_key ->> 'key_hash',
            p_key ->> 'hash_secret_id', p_key ->> 'environment_tag', p_key -> 'scope_permissions', p_primary)
    returning id into v_id;
    insert into public.rate_limit_usage (subject, subject_id, burst_ring, minute_ring, hour_ring, day_ring)
    values ('key', v_id, null, null, null, null);
    return v_id;
end $$;
revoke all on function public.insert_key(bigint, jsonb, boolean) from public, anon, authenticated;
grant execute on function public.insert_key(bigint, jsonb, boolean) to service_role;

-- What create_key and issue_key share. A user has at most 50 active keys and 500 that are not revoked.
-- Outcomes: created, too_many (with the limit), name_taken.
create function public.add_key(p jsonb, p_user_id bigint) returns jsonb
language plpgsql set search_path = '' as $$
declare
    v_key public.api_keys_new := jsonb_populate_record(null::public.api_keys_new, p -> 'key');
begin
    if (select count(*) from public.api_keys_new k
        where k.user_id = p_user_id and k.revoked_at is null and k.is_active) >= 50 then
        return jsonb_build_object('outcome', 'too_many', 'limit', 50);
    elsif (select count(*) from public.api_keys_new k where k.user_id = p_user_id and k.revoked_at is null)
          >= 500 then
        return jsonb_build_object('outcome', 'too_many', 'limit', 500);
    elsif exists (select from public.api_keys_new k
                  where k.user_id = p_user_id and k.revoked_at is null and k.key_name = v_key.key_name) then
        return jsonb_build_object('outcome', 'name_taken');
    end if;
    insert into public.api_keys_new (
        user_id, key_name, key_prefix, last4, key_hash, hash_secret_id, encrypted_key, environment_tag,
        scope_permissions, ip_allowlist, domain_referrers, allowed_models, expiration_date, max_requests,
        budget_nanos, budget_window, cache_ttl_seconds)
    values (p_user_id, v_key.key_name, v_key.key_prefix, v_key.last4, v_key.key_hash, v_key.hash_secret_id,
            v_key.encrypted_key, v_key.environment_tag, v_key.scope_permissions, v_key.ip_allowlist,
            v_key.domain_referrers, v_key.allowed_models, v_key.expiration_date, v_key.max_requests,
            v_key.budget_nanos, v_key.budget_window, v_key.cache_ttl_seconds)
    returning * into v_key;
    insert into public.rate_limit_usage (subject, subject_id, burst_ring, minute_ring, hour_ring, day_ring)
    values ('key', v_key.id, null, null, null, null);
    perform public.audit_key(
        p, 'create', v_key, jsonb_build_object(
            'key_name', v_key.key_name, 'environment_tag', v_key.environment_tag));
    return jsonb_build_object('outcome', 'created', 'key', public.key_view(v_key));
end $$;
revoke all on function public.add_key(jsonb, bigint) from public, anon, authenticated;
grant execute on function public.add_key(jsonb, bigint) to service_role;

-- p: user_id, maker_id, key {...}. Outcomes: those of add_key, broader, not_found.
create function public.create_key(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_maker public.api_keys_new := public.acting_key(p);
    v_why text;
begin
    if v_user.id is null or v_maker.id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    v_why := public.broader_than(jsonb_populate_record(null::public.api_keys_new, p -> 'key'), v_maker);
    if v_why is null and exists (
        select from public.rate_limit_configs c where c.subject = 'key' and c.subject_id = v_maker.id) then
        v_why := 'rate_limits';
    end if;
    if v_why is not null then
        return jsonb_build_object('outcome', 'broader', 'field', v_why);
    end if;
    return public.add_key(p, v_user.id);
end $$;
revoke all on function public.create_key(jsonb) from public, anon, authenticated;
grant execute on function public.create_key(jsonb) to service_role;

-- For administrators: a key for a user who lost theirs, or one with the scope `admin`.
-- p: user_id, key {...}. Outcomes: those of add_key, not_found.
create function public.issue_key(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
begin
    if v_user.id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    return public.add_key(p, v_user.id);
end $$;
comment on function public.issue_key is
    'An administrator''s: no key of the user stands behind it, so nothing bounds what it may do.';
revoke all on function public.issue_key(jsonb) from public, anon, authenticated;
grant execute on function public.issue_key(jsonb) to service_role;

-- Brings in keys of older formats. Known ones stay as they are.
-- p: keys [{user_id, key_sha256, key_name, key_prefix, last4, environment_tag, ...}].
-- Outcomes: imported, not_found (with the user_id that does not exist; then nothing is imported).
create function public.import_keys(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_missing bigint;
    v_count int;
begin
    select (i ->> 'user_id')::bigint into v_missing from jsonb_array_elements(p -> 'keys') as i
    where not exists (select from public.users u
                      where u.id = (i ->> 'user_id')::bigint and u.deleted_at is null) limit 1;
    if found then
        return jsonb_build_object('outcome', 'not_found', 'user_id', v_missing);
    end if;
    perform public.lock_users(
        array(select (i ->> 'user_id')::bigint from jsonb_array_elements(p -> 'keys') as i));
    insert into public.api_keys (
        user_id, key_sha256, key_name, key_prefix, last4, environment_tag, scope_permissions, expiration_date,
        max_requests, is_active)
    select k.user_id, k.key_sha256, k.key_name, k.key_prefix, k.last4, k.environment_tag, k.scope_permissions,
           k.expiration_date, k.max_requests, k.is_active
    from jsonb_populate_recordset(null::public.api_keys, p -> 'keys') as k
    on conflict (key_sha256) do nothing;
    get diagnostics v_count = row_count;
    perform public.write_audit(
        p ->> 'actor', 'import_keys', null, null, null, p ->> 'address', p ->> 'user_agent',
        (p ->> 'request_id')::uuid, jsonb_build_object('imported', v_count));
    return jsonb_build_object(
        'outcome', 'imported', 'imported', v_count, 'known', jsonb_array_length(p -> 'keys') - v_count);
end $$;
revoke all on function public.import_keys(jsonb) from public, anon, authenticated;
grant execute on function public.import_keys(jsonb) to service_role;

-- Changing and ending keys
-- ------------------------

-- p: user_id, maker_id, key_id, changes {...}. Outcomes: updated, name_taken, broader, too_many, not_found.
create function public.update_key(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_maker public.api_keys_new := public.acting_key(p);
    v_key public.api_keys_new;
    v_why text;
begin
    select * into v_key from public.api_keys_new k
    where k.id = (p ->> 'key_id')::bigint and k.user_id = v_user.id and k.revoked_at is null for update;
    if not found or v_maker.id is null then
        return jsonb_build_object('outcome', 'not_found');
    end if;
    v_key := jsonb_populate_record(v_key, p -> 'changes');
    v_why := public.broader_than(v_key, v_maker);
    if v_why is not null then
        return jsonb_build_object('outcome', 'broader', 'field', v_why);
    elsif exists (select from public.api_keys_new k
                  where k.user_id = v_user.id and k.revoked_at is null
                    and k.key_name = v_key.key_name and k.id <> v_key.id) then
        return jsonb_build_object('outcome', 'name_taken');
    elsif v_key.is_active
          and (select count(*) from public.api_keys_new k
               where k.user_id = v_user.id and k.revoked_at is null
                 and k.is_active and k.id <> v_key.id) >= 50 then
        return jsonb_build_object('outcome', 'too_many');
    end if;
    update public.api_keys_new k set
        key_name = v_key.key_name, scope_permissions = v_key.scope_permissions,
        ip_allowlist = v_key.ip_allowlist, domain_referrers = v_key.domain_referrers,
        allowed_models = v_key.allowed_models, expiration_date = v_key.expiration_date,
        max_requests = v_key.max_requests, budget_nanos = v_key.budget_nanos,
        budget_window = v_key.budget_window, cache_ttl_seconds = v_key.cache_ttl_seconds,
        is_active = v_key.is_active, updated_at = clock_timestamp()
    where k.id = v_key.id returning * into v_key;
    perform public.audit_key(
        p, 'update', v_key, jsonb_build_object(
            'fields', (select jsonb_agg(f) from jsonb_object_keys(p -> 'changes') f)));
    return jsonb_build_object('outcome', 'updated', 'key', public.key_view(v_key));
end $$;
revoke all on function public.update_key(jsonb) from public, anon, authenticated;
grant execute on function public.update_key(jsonb) to service_role;

-- All of these keys or none. The old secrets stay valid for grace_seconds.
-- p: user_id, maker_id, grace_seconds, keys [{key_id, key_hash, hash_secret_id, last4, encrypted_key}].
-- Outcomes: rotated, broader, not_found.
create function public.rotate_keys(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_maker public.api_keys_new := public.acting_key(p);
    v_new record;
    v_key public.api_keys_new;
    v_until timestamptz := clock_timestamp() + make_interval(secs => (p ->> 'grace_seconds')::int);
    v_views jsonb := '[]';
begin
    for v_new in select n.* from jsonb_to_recordset(p -> 'keys')
                 as n (key_id bigint, key_hash text, hash_secret_id text, last4 text, encrypted_key text) loop
        select * into v_key from public.api_keys_new k
        where k.id = v_new.key_id and k.user_id = v_user.id and k.revoked_at is null;
        if not found or v_maker.id is null then
            return jsonb_build_object('outcome', 'not_found', 'key_id', v_new.key_id);
        elsif public.broader_than(v_key, v_maker) is not null then
            return jsonb_build_object(
                'outcome', 'broader', 'field', public.broader_than(v_key, v_maker), 'key_id', v_key.id);
        end if;
    end loop;
    for v_new in select n.* from jsonb_to_recordset(p -> 'keys')
                 as n (key_id bigint, key_hash text, hash_secret_id text, last4 text, encrypted_key text) loop
        update public.api_keys_new k set
            previous_key_hash = k.key_hash, previous_hash_secret_id = k.hash_secret_id,
            previous_valid_until = v_until, key_hash = v_new.key_hash, hash_secret_id = v_new.hash_secret_id,
            last4 = v_new.last4,
            encrypted_key = case when k.encrypted_key is not null then v_new.encrypted_key end,
            updated_at = clock_timestamp()
        where k.id = v_new.key_id returning * into v_key;
        perform public.audit_key(
            p, 'rotate', v_key, jsonb_build_object('grace_seconds', (p ->> 'grace_seconds')::int));
        v_views := v_views || public.key_view(v_key);
    end loop;
    return jsonb_build_object('outcome', 'rotated', 'keys', v_views);
end $$;
revoke all on function public.rotate_keys(jsonb) from public, anon, authenticated;
grant execute on function public.rotate_keys(jsonb) to service_role;

-- p: user_id (null: anybody's, for an administrator), maker_id (null: an administrator), key_id.
-- A key cannot revoke one of a higher environment, as it cannot change or rotate one. Outcomes: revoked,
-- broader, not_found.
create function public.revoke_key(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users :=
        public.lock_target(p || jsonb_build_object('user_id', coalesce((p ->> 'user_id')::bigint, (
            select k.user_id from public.api_keys_new k where k.id = (p ->> 'key_id')::bigint))));
    v_maker public.api_keys_new := public.acting_key(p);
    v_key public.api_keys_new;
begin
    select * into v_key from public.api_keys_new k
    where k.id = (p ->> 'key_id')::bigint and k.user_id = v_user.id and k.revoked_at is null;
    if not found or (p ->> 'maker_id' is not null and v_maker.id is null) then
        return jsonb_build_object('outcome', 'not_found');
    elsif public.environment_rank(v_key.environment_tag) > public.environment_rank(v_maker.environment_tag)
          and v_maker.id is not null then
        return jsonb_build_object('outcome', 'broader', 'field', 'environment_tag');
    end if;
    update public.api_keys_new k set is_active = false, is_primary = false, revoked_at = clock_timestamp(),
        updated_at = clock_timestamp(), encrypted_key = null, previous_key_hash = null,
        previous_hash_secret_id = null, previous_valid_until = null
    where k.id = v_key.id returning * into v_key;
    perform public.audit_key(p, 'delete', v_key, jsonb_build_object('key_name', v_key.key_name));
    return jsonb_build_object('outcome', 'revoked', 'user_id', v_key.user_id, 'key_id', v_key.id);
end $$;
revoke all on function public.revoke_key(jsonb) from public, anon, authenticated;
grant execute on function public.revoke_key(jsonb) to service_role;

-- p: user_id, maker_id, key_id. Every look is audited.
-- Outcomes: revealed (with the token), not_revealable, broader, not_found.
create function public.reveal_key(p jsonb) returns jsonb language plpgsql set search_path = '' as $$
declare
    v_user public.users := public.lock_target(p);
    v_maker public.api_keys_new := public.acting_key(p);
    v_key public.api_keys_new;
begin
    select * into v_key from public.api_keys_new k
    where k.id = (p ->> 'key_id')::bigint and k.user_id = v_user.id and k.revoked_at is null;
    if not found or v_maker.id is null then
        return jsonb_build_object('outcome', 'not_found');
    elsif v_key.encrypted_key is null then
        return jsonb_build_object('outcome', 'not_revealable');
    elsif public.broader_than(v_key, v_maker) is not null then
        return jsonb_build_object('outcome', 'broader', 'field', public.broader_than(v_key, v_maker));
    end if;
    perform public.audit_key(p, 'reveal', v_key, null);
    return jsonb_build_object(
        'outcome', 'revealed', 'encrypted_key', v_key.encrypted_key, 'key', public.key_view(v_key));
end $$;
revoke all on function public.reveal_key(jsonb) from public, anon, authenticated;
grant execute on function public.reveal_key(jsonb) to service_role;

create function public.audit_key(
    p jsonb, p_action text, p_key public.api_keys_new, p_details jsonb
) returns void language sql set search_path = '' as $$
    select public.write_audit(
        p ->> 'actor', p_action, 'key:' || p_key.id, p_key.user_id, p_key.id, p ->> 'address',
        p ->> 'user_agent', (p ->> 'request_id')::uuid, p_details)
$$;
revoke all on function public.audit_key(jsonb, text, public.api_keys_new, jsonb)
    from public, anon, authenticated;
grant execute on function public.audit_key(jsonb, text, public.api_keys_new, jsonb) to service_role;

-- Showing keys
-- ------------

-- A key without its secrets, with what it has used.
create function public.key_view(p_key public.api_keys_new) returns jsonb
language sql stable set search_path = '' as $$
    select (to_jsonb(p_key) - 'key_hash' - 'hash_secret_id' - 'encrypted_key' - 'previous_key_hash'
            - 'previous_hash_secret_id')
           || jsonb_build_object(
               'is_revealable', p_key.encrypted_key is not null,
               'requests_used', coalesce(u.requests_used, 0), 'last_used_at', u.last_used_at,
               'budget_since', nullif(u.budget_since, '-infinity'),
               'budget_spent_nanos',
               case when u.budget_since < public.budget_start(p_key.budget_window, now()) then 0
                    else coalesce(u.budget_spent_nanos, 0) end)
    from (select) as one left join public.rate_limit_usage u on u.subject = 'key' and u.subject_id = p_key.id
$$;
revoke all on function public.key_view(public.api_keys_new) from public, anon, authenticated;
grant execute on function public.key_view(public.api_keys_new) to service_role;

create function public.list_keys(p_user_id bigint) returns jsonb
language sql stable set search_path = '' as $$
    select coalesce(jsonb_agg(public.key_view(k) order by k.id), '[]') from public.api_keys_new k
    where k.user_id = p_user_id and k.revoked_at is null
$$;
revoke all on function public.list_keys(bigint) from public, anon, authenticated;
grant execute on function public.list_keys(bigint) to service_role;

-- For administrators: keys by what is shown of them (prefix and last 4), by name or by user.
create function public.find_keys(p_text text, p_user_id bigint, p_before bigint, p_limit int) returns jsonb
language sql stable set search_path = '' as $$
    select coalesce(jsonb_agg(public.key_view(k) order by k.id desc), '[]') from (
        select * from public.api_keys_new k
        where (p_user_id is null or k.user_id = p_user_id) and (p_before is null or k.id < p_before)
          and (p_text is null or k.last4 = right(p_text, 4) and starts_with(p_text, k.key_prefix)
               or strpos(lower(k.key_name), lower(p_text)) > 0
               or starts_with(k.key_prefix, p_text))
        order by k.id desc limit p_limit) as k
$$;
revoke all on function public.find_keys(text, bigint, bigint, int) from public, anon, authenticated;
grant execute on function public.find_keys(text, bigint, bigint, int) to service_role;

-- What a key has been charged, in all and in the UTC day, week and month; and the cost of its requests that
-- were sent with the user's own upstream key.
create function public.key_usage(p_user_id bigint, p_key_id bigint) returns jsonb
language sql stable set search_path = '' as $$
    with starts as (
        select date_trunc('day', t)::date as today, date_trunc('week', t)::date as week,
               date_trunc('month', t)::date as month
        from (select now() at time zone 'UTC' as t) as n
    ), days as (
        select d.day, d.cost_nanos from public.usage_days d
        where d.user_id = p_user_id and d.key_id = p_key_id
        union all
        select (s.slot at time zone 'UTC')::date, s.cost_nanos
        from public.count_usage(p_user_id, (select summed_until from public.usage_sums_state), 'infinity') s
        where s.key_id = p_key_id
    ), own as (
        select (r.created_at at time zone 'UTC')::date as day,
               coalesce(r.upstream_cost_nanos, 0) as cost_nanos
        from public.usage_records r where r.key_id = p_key_id and r.byok
    )
    select jsonb_build_object(
        'usage_nanos', coalesce(sum(a.charged), 0),
        'usage_daily_nanos', coalesce(sum(a.charged) filter (where a.day >= s.today), 0),
        'usage_weekly_nanos', coalesce(sum(a.charged) filter (where a.day >= s.week), 0),
        'usage_monthly_nanos', coalesce(sum(a.charged) filter (where a.day >= s.month), 0),
        'byok_usage_nanos', coalesce(sum(a.own), 0),
        'byok_usage_daily_nanos', coalesce(sum(a.own) filter (where a.day >= s.today), 0),
        'byok_usage_weekly_nanos', coalesce(sum(a.own) filter (where a.day >= s.week), 0),
        'byok_usage_monthly_nanos', coalesce(sum(a.own) filter (where a.day >= s.month), 0))
    from starts s left join (
        select d.day, d.cost_nanos as charged, 0 as own from days d
        union all
        select o.day, 0, o.cost_nanos from own o) as a on true
$$;
revoke all on function public.key_usage(bigint, bigint) from public, anon, authenticated;
grant execute on function public.key_usage(bigint, bigint) to service_role;

-- A key with what it has used, its tightest limit on requests, and whether its account is on the free plan.
-- Null for another user's key.
create function public.read_key(p_user_id bigint, p_key_id bigint) returns jsonb
language sql stable set search_path = '' as $$
    select public.key_view(k) || public.key_usage(p_user_id, p_key_id) || jsonb_build_object(
        'budget_held_nanos', coalesce((select g.budget_held_nanos from public.rate_limit_usage g
                                       where g.subject = 'key' and g.subject_id = k.id), 0),
        'requests_per_minute', (
            select min(c.requests_per_minute) from public.rate_limit_configs c
            where (c.subject, c.subject_id) in (('key', k.id), ('user', u.id))
               or (c.subject = 'default' and not exists (select from public.rate_limit_configs o
                                                         where o.subject = 'user' and o.subject_id = u.id))),
        'is_free_tier', (select p.slug = 'free' from public.current_plan(u, now()) as p))
    from public.api_keys_new k join public.users u on u.id = k.user_id
    where k.id = p_key_id and k.user_id = p_user_id and k.revoked_at is null
$$;
revoke all on function public.read_key(bigint, bigint) from public, anon, authenticated;
grant execute on function public.read_key(bigint, bigint) to service_role;
